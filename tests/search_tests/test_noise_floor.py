"""The noise floor: its arithmetic, what neutral changes do, and that it is measured once per workload."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hyquant.calibration.store import Store
from hyquant.config import QuantConfig, W8A8Dynamic
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from hyquant.models.base import RenderSettings
from hyquant.models.tiny import TinyVideoModel
from metrics.errors import MetricError
from search import floor_measuring
from search.answers import floor_lines
from search.control import control_values
from search.floor_measuring import prepare_floor
from search.locks import HostLock
from search.metric_names import computed_figures, unknown_metrics, worse
from search.neutral_changes import CHANGES, MAX_MATH_TOKENS, SplitSums, render_changed
from search.noise_floor import NoiseFloor, noise_floor
from search.objective import run_trial
from search.prepare import prepare_judge, prepare_workbench
from search.prompts import StudyPrompts
from search.representable import guidance_note
from search.scoring import metric_results, over_prompts
from search.stages import Stages
from search.study import Objective

PROMPTS = StudyPrompts(calibration=("one red cube",), search=("a green cone", "a grey ring"))
CHANGE = {change.name: change for change in CHANGES}


@pytest.fixture(scope="module")
def bench(tmp_path_factory, study_config):
    """One rank's warm state without a floor."""
    folder = tmp_path_factory.mktemp("floor")
    made = prepare_workbench(
        study_config,
        PROMPTS,
        group=Group(),
        device=resolve_device("cpu"),
        cache=folder / "cache",
        lock=HostLock(folder / "locks"),
    )
    prepare_judge(made, Stages(Group()))
    return made


def test_the_floor_is_that_of_the_change_that_moves_the_metric_most():
    perfect = {"psnr_db": [100.0, 100.0], "motion_energy_ratio": [1.0, 1.0]}
    changed = {
        "a": {"psnr_db": [60.0, 80.0], "motion_energy_ratio": [1.0, 1.02]},
        "b": {"psnr_db": [75.0, 75.0], "motion_energy_ratio": [0.9, 1.0]},
    }

    floor = noise_floor(perfect, changed)

    assert floor.metrics["psnr_db"].change == "a"
    assert floor.metrics["psnr_db"].distances == (40.0, 20.0)
    assert floor.metrics["motion_energy_ratio"].change == "b"
    assert floor.metrics["motion_energy_ratio"].distances == pytest.approx((0.1, 0.0))
    assert (floor.metrics["psnr_db"].mean, floor.metrics["psnr_db"].worst) == (30.0, 40.0)


def test_an_excess_in_db_is_floor_minus_value_and_a_ratio_counts_from_both_sides():
    floor = noise_floor(
        {"psnr_db": [100.0, 100.0], "motion_energy_ratio": [1.0, 1.0]},
        {"a": {"psnr_db": [60.0, 80.0], "motion_energy_ratio": [1.01, 0.99]}},
    )

    scores = {"psnr_db": [50.0, 85.0], "motion_energy_ratio": [0.5, 1.5]}
    results = metric_results(scores, {}, floor, prompts=["a", "b"])
    figures = over_prompts(results)

    assert results["psnr_db_excess"].values == (10.0, -5.0)
    assert figures["psnr_db_excess"] == 2.5
    assert figures["psnr_db_excess_worst"] == 10.0
    assert results["motion_energy_ratio_excess"].values == pytest.approx((0.49, 0.49))


def test_a_floor_of_some_prompts_is_that_of_these():
    floor = noise_floor({"ssim": [1.0, 1.0, 1.0]}, {"a": {"ssim": [0.9, 0.8, 0.7]}})

    assert floor.at([2, 0]).metrics["ssim"].distances == pytest.approx((0.3, 0.1))


def test_a_floor_is_refused_where_a_float_clip_has_no_score():
    with pytest.raises(MetricError, match="ssim has others under a"):
        noise_floor({"ssim": [1.0]}, {"a": {"ssim": [math.nan]}})


def test_a_floor_of_identical_videos_is_said_to_be_none():
    floor = noise_floor({"ssim": [1.0]}, {"a": {"ssim": [1.0]}}, identical=["a"])

    assert floor.is_perfect
    assert floor.metrics["ssim"].mean == 0.0
    assert "bit for bit" in floor_lines(floor)[1]


def test_split_sums_change_the_rounding_of_a_linear_and_nothing_else():
    """Against float64; float32 sums of 256 products differ by some 1e-6."""
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 64), torch.randn(8, 256)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())

    with torch.no_grad(), SplitSums():
        split = linear(x)
        without_bias = F.linear(x, linear.weight)
        untouched = torch.relu(x)

    assert not torch.equal(split, linear(x))
    assert torch.allclose(split.double(), exact, atol=1e-5)
    assert torch.allclose(without_bias + linear.bias, split, atol=1e-5)
    assert torch.equal(untouched, x.relu())


@pytest.mark.parametrize("name", CHANGE)
def test_a_neutral_change_moves_a_float32_video_by_rounding_only(name):
    model, settings = TinyVideoModel(0), RenderSettings(height=16, width=16, num_frames=5, num_steps=2, batch_size=2)
    pairs = [("a cube", 1), ("two grey balls", 2)]
    plain = model.render([p for p, _ in pairs], [s for _, s in pairs], settings)

    changed = render_changed(model, CHANGE[name], pairs, settings)

    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(plain, changed, strict=True))


def test_changes_that_cannot_be_made_say_why():
    model, settings = TinyVideoModel(0), RenderSettings(height=64, width=64, num_frames=5, num_steps=2, batch_size=1)
    huge = settings.model_copy(update={"height": 2048, "width": 2048})

    assert "alone" in CHANGE["batch split"].obstacle(model, settings)
    assert CHANGE["math attention"].obstacle(model, settings) is None
    assert str(2 * 256 * 256) in CHANGE["math attention"].obstacle(model, huge)
    assert MAX_MATH_TOKENS < 2 * 256 * 256


def test_the_floor_is_measured_once_per_workload(bench, tmp_path, monkeypatch):
    fresh = dataclasses.replace(bench, cache=Store(tmp_path))
    prepare_floor(fresh, Stages(Group()))
    again = dataclasses.replace(fresh, floor=None)
    monkeypatch.setattr(floor_measuring, "render_changed", None)

    prepare_floor(again, Stages(Group()))

    assert again.floor == fresh.floor
    assert set(fresh.floor.metrics) == {"clip_reference", "psnr_db", "ssim", "motion_energy_ratio", "collapsed"}
    assert fresh.floor.changes == ("batch split", "math attention", "split sums")


def test_a_slot_takes_the_floor_of_its_study_and_gives_its_own_only_where_there_is_none(bench, tmp_path, monkeypatch):
    """Its own would be another one: on another device, with another number of ranks, or without a common cache."""
    study: list[NoiseFloor] = []

    def agree(own):
        study.extend([] if own is None or study else [own])
        return study[0] if study else None

    first = dataclasses.replace(bench, cache=Store(tmp_path / "first"))
    prepare_floor(first, Stages(Group()), agree)
    assert study == [first.floor]

    theirs = {name: [value - 0.125 for value in one.values] for name, one in first.floor.metrics.items()}
    perfect = {name: one.perfect for name, one in first.floor.metrics.items()}
    study[0] = noise_floor(perfect, {"split sums": theirs})
    monkeypatch.setattr(floor_measuring, "render_changed", None)
    for cache in ("first", "elsewhere"):
        other = dataclasses.replace(bench, cache=Store(tmp_path / cache))
        prepare_floor(other, Stages(Group()), agree)
        assert other.floor == study[0]


def test_a_bfloat16_model_has_a_floor_and_a_float_candidate_is_at_minus_it(study_config, tmp_path):
    model = study_config.model.model_copy(update={"dtype": "bfloat16"})
    config = study_config.model_copy(update={"model": model})
    made = prepare_workbench(
        config, PROMPTS, group=Group(), device=resolve_device("cpu"), cache=tmp_path, lock=HostLock(tmp_path / "locks")
    )

    float_control = run_trial(made, QuantConfig(linear=None), Stages(Group())).result
    int8 = run_trial(made, QuantConfig(linear=W8A8Dynamic()), Stages(Group())).result

    floor = made.floor.metrics["psnr_db"]
    assert floor.mean > 10.0
    assert float_control.metrics["psnr_db_excess"].mean == pytest.approx(-floor.mean)
    assert int8.metrics["psnr_db_excess"].mean == pytest.approx(
        100.0 - floor.mean - int8.metrics["psnr_db"].mean, abs=1e-9
    )
    (at,) = control_values(["psnr_db_excess"], {}, made.floor)
    assert at == pytest.approx(-floor.mean)


def test_an_excess_may_be_named_where_its_metric_is_scored(study_config):
    objective = Objective(metric="clip_reference_excess", direction="minimize")
    config = study_config.model_copy(update={"objectives": (objective,)})

    assert unknown_metrics(config) == []
    assert "needs 'clip_reference' in metrics" in unknown_metrics(config.model_copy(update={"metrics": ("ssim",)}))[0]
    assert {"ssim_excess", "ssim_excess_worst"} <= set(computed_figures(("ssim", "clip_prompt")))
    assert "clip_prompt_excess" not in computed_figures(("ssim", "clip_prompt"))
    assert worse("ssim_excess")([0.1, 0.3]) == 0.3


def test_a_stored_floor_is_read_as_it_was_written():
    floor = noise_floor({"ssim": [1.0]}, {"a": {"ssim": [0.9]}}, left_out=["b: no memory"])

    assert NoiseFloor.model_validate_json(floor.model_dump_json()) == floor
    assert "left out: b: no memory" in floor_lines(floor)[0]


def test_a_study_whose_guidance_is_rounded_is_told_two_ways_out(study_config):
    def with_dtype(dtype, **settings):
        rendered = study_config.workload.settings.model_copy(update=settings)
        workload = study_config.workload.model_copy(update={"settings": rendered})
        model = study_config.model.model_copy(update={"dtype": dtype})
        return study_config.model_copy(update={"model": model, "workload": workload})

    note = guidance_note(with_dtype("bfloat16"))

    assert "makes it 6016" in note
    assert "take 8," in note
    assert guidance_note(with_dtype("float32")) is None
    assert guidance_note(with_dtype("float32", guidance_scale=8.1)) is None  # off by one in the last of 24 bits
    assert guidance_note(with_dtype("bfloat16", guidance_scale=8.0)) is None
    assert guidance_note(with_dtype("bfloat16", round_inputs=True)) is None


def test_rounded_inputs_change_a_float32_video_and_its_name_in_caches_only_if_asked_for():
    model, plain = TinyVideoModel(0), RenderSettings(height=16, width=16, num_frames=5, num_steps=3)
    rounded = plain.model_copy(update={"round_inputs": True})
    exact = rounded.model_copy(update={"guidance_scale": 8.0, "num_steps": 2})  # timesteps 1000 and 500
    records = {"plain": [], "rounded": []}
    model.capture(["a cube"], [1], plain, records["plain"].append)
    model.capture(["a cube"], [1], rounded, records["rounded"].append)

    assert "round_inputs" not in plain.model_dump()
    assert RenderSettings.model_validate(rounded.model_dump()) == rounded
    assert records["plain"][0].inputs["guidance"].tolist() == [6000.0]
    assert records["rounded"][0].inputs["guidance"].tolist() == [6016.0]
    assert [record.inputs["timestep"].item() for record in records["rounded"]] == [1000.0, 668.0, 334.0]
    same = exact.model_copy(update={"round_inputs": False})
    assert torch.equal(model.render(["a"], [1], exact)[0], model.render(["a"], [1], same)[0])
