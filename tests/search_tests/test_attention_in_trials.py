"""Quantized attention in trials and exports of a study: observed once per statistic, and labelled by how it ran."""

import dataclasses

import pytest
import torch

from hyquant.calibration.store import Store
from hyquant.config import FA3Fp8, FA3Int8, QuantConfig, W8A8Dynamic, W8A8Static
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from hyquant.export import verify_export
from hyquant.kernels.x86_attention import attends_natively
from hyquant.models.attentions import attention_blocks
from hyquant.plan import build_plan
from search.attention import prepare_attention
from search.errors import TrialFailed
from search.exporting import export_config
from search.locks import HostLock
from search.logged import config_params
from search.objective import run_trial
from search.prepare import prepare_workbench
from search.prompts import StudyPrompts
from search.stages import Stages

PROMPTS = StudyPrompts(calibration=("one red cube", "two blue balls"), search=("a green cone",))


@pytest.fixture(scope="module")
def bench(tmp_path_factory, study_config):
    folder = tmp_path_factory.mktemp("bench")
    return prepare_workbench(
        study_config,
        PROMPTS,
        group=Group(),
        device=resolve_device("cpu"),
        cache=folder / "cache",
        lock=HostLock(folder / "locks"),
    )


@pytest.mark.parametrize("attention", [FA3Int8(), FA3Fp8()], ids=["int8", "fp8"])
@pytest.mark.parametrize("linear", [None, W8A8Dynamic()], ids=["attention alone", "with linears"])
def test_a_trial_quantizes_attention_and_says_how_it_ran(bench, attention, linear):
    processors = [block.attn.processor for block in bench.model.denoiser.transformer_blocks]
    config = QuantConfig(linear=linear, attention=attention)
    stages = Stages(Group())

    measurement = run_trial(bench, config, stages)

    result, evidence = measurement.result, measurement.evidence
    assert result.outcome == "complete"
    assert result.metrics["psnr_db"].mean < 100.0
    runs_natively = attention.kind == "fa3_int8" and attends_natively(torch.device("cpu"), 16)
    kind = "native" if runs_natively else "simulated"
    assert result.latency.kind == kind
    assert f"{kind} attention" in result.latency.kernels
    assert {block.scheme for block in evidence.report.attentions} == {attention.kind}
    assert len(evidence.report.attentions) == len(evidence.plan.attentions) == 4
    assert [block.attn.processor for block in bench.model.denoiser.transformer_blocks] == processors
    assert config_params(config)["attention.kind"] == attention.kind


def test_heads_are_observed_once_per_ratios_whatever_blocks_a_config_selects(bench, monkeypatch):
    """A second config with the same ratios needs nothing, and a new process what the store has."""
    fresh = dataclasses.replace(bench, cache=Store(bench.cache.root / "heads"), head_stats={})
    observed = []
    original = torch.topk
    monkeypatch.setattr(torch, "topk", lambda *args, **kwargs: observed.append(1) or original(*args, **kwargs))

    def stats_of(bench, attention):
        observed.clear()
        plan = build_plan(
            bench.model.groups(),
            QuantConfig(linear=None, attention=attention),
            num_steps=2,
            attentions=attention_blocks(bench.model.denoiser),
        )
        return prepare_attention(bench, plan, Stages(Group())), bool(observed)

    first, was_observed = stats_of(fresh, FA3Int8(ratio_qk=0.9))
    again, was_observed_again = stats_of(fresh, FA3Int8(ratio_qk=0.9, layers=("*single_blocks*",)))
    later, was_observed_later = stats_of(dataclasses.replace(fresh, head_stats={}), FA3Int8(ratio_qk=0.9))
    other, was_observed_for_others = stats_of(fresh, FA3Int8(ratio_qk=0.8))

    assert (was_observed, was_observed_again, was_observed_later, was_observed_for_others) == (True, False, False, True)
    assert again is first
    assert all(torch.equal(later[name].lo, first[name].lo) for name in first)
    assert any(not torch.equal(other[name].lo, first[name].lo) for name in first)
    assert stats_of(fresh, FA3Fp8())[0] is None


def test_observing_attention_is_part_of_the_stage_calibrate(bench):
    fresh = dataclasses.replace(bench, cache=Store(bench.cache.root / "stage"), head_stats={})
    stages = Stages(Group())

    run_trial(fresh, QuantConfig(linear=None, attention=FA3Int8()), stages)

    assert stages.seconds["calibrate"] > 0
    assert fresh.stats == {}


def test_a_target_that_ignores_int8_attention_fails_the_trial_with_its_sentence(bench):
    strict = dataclasses.replace(bench, config=bench.config.model_copy(update={"target": "mindie-sd-3.1/910b"}))

    with pytest.raises(TrialFailed, match=r"mindie-sd-3\.1/910b ignores int8 attention .*use target hyquant or"):
        run_trial(strict, QuantConfig(linear=W8A8Dynamic(), attention=FA3Int8()), Stages(Group()))


def test_a_study_exports_quantized_attention(study_config, tmp_path):
    config = study_config.model_copy(update={"store": str(tmp_path / "store")})

    exported = export_config(config, PROMPTS, QuantConfig(linear=W8A8Dynamic(), attention=FA3Int8()), tmp_path / "out")

    assert exported.report.ok
    assert exported.manifest.layer_counts["fa3_int8 attention"] == 4
    assert verify_export(tmp_path / "out").ok


def test_sequential_calibration_leaves_attention_in_float_until_the_end(bench):
    config = QuantConfig(linear=W8A8Static(), attention=FA3Int8(), calibration="sequential")

    measurement = run_trial(bench, config, Stages(Group()))

    assert measurement.result.outcome == "complete"
    assert len(measurement.evidence.report.attentions) == 4
