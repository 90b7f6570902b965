"""Trials of the tiny model in this process: the recipe, and what rank 0 makes of its outcome in Optuna and MLflow."""

import dataclasses
import errno
import math
from pathlib import Path

import optuna
import pytest
import torch
from optuna.exceptions import UpdateFinishedTrialError

from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.sequential import observe_sequential
from hyquant.calibration.store import Store
from hyquant.config import M3, M4, M6, LayerSelection, QuantConfig, W8A8Dynamic, W8A8Static, W8A8Timestep, digest
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from hyquant.errors import ConfigError
from hyquant.export import load_quantized
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, quantized_tensors, restore_
from hyquant.smoothing.search import PlanSearch
from search.errors import StageBug, TrialFailed
from search.exporting import ExportShape, export_config
from search.leader import Leader
from search.locks import HostLock
from search.objective import run_trial
from search.order import WorkOrder, read_state, slot_folder
from search.pace import DUPLICATES_BEFORE_RANDOM
from search.prepare import calibrate, calibrate_sequentially, prepare_workbench
from search.prompts import StudyPrompts
from search.proposal import enqueue_point
from search.repair import agreement
from search.scales import prepare_scales
from search.stages import Stages, kind_of
from search.stall import why_over
from search.storage import create_study, store_errors, stored_config
from search.study import STAGES, Budget, Constraint, SamplerConfig
from search.tracking import Tracker
from search.trials import count_states, trial_config, trial_reason, trial_result, trial_state
from search.workbench import calibration_seeds, observe_shard, stored_stats, wants_histograms
from spaces.space import SearchSpace

PROMPTS = StudyPrompts(calibration=("one red cube", "two blue balls"), search=("a green cone", "a grey ring"))


@pytest.fixture(scope="session")
def bench(tmp_path_factory, study_config):
    """One rank's warm state, alone in its group."""
    folder = tmp_path_factory.mktemp("bench")
    return prepare_workbench(
        study_config,
        PROMPTS,
        group=Group(),
        device=resolve_device("cpu"),
        cache=folder / "cache",
        lock=HostLock(folder / "locks"),
    )


def plan_for(bench, config):
    return build_plan(bench.model.groups(), config, num_steps=bench.config.workload.settings.num_steps)


def with_space(bench, **changes):
    """Change the space; unless given, it has nothing that needs histograms."""
    plain = {"act_methods": ("minmax", "mean_minmax"), "percentiles": ("none",)}
    return with_config(bench, space=bench.config.space.model_copy(update=plain | changes))


def with_config(bench, **changes):
    return dataclasses.replace(bench, config=bench.config.model_copy(update=changes))


def test_the_float_control_scores_as_its_own_reference(bench):
    measurement = run_trial(bench, QuantConfig(linear=None), Stages(Group()))

    metrics = measurement.result.metrics
    assert metrics["psnr_db"].values == (100.0, 100.0)
    assert metrics["clip_reference"].mean == pytest.approx(1.0, abs=1e-6)
    assert metrics["clip_prompt_drop"].mean == pytest.approx(0.0, abs=1e-6)
    assert metrics["motion_energy_ratio"].mean == pytest.approx(1.0, abs=1e-6)
    assert metrics["collapsed"].mean == 0.0


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(linear=W8A8Dynamic()),
        QuantConfig(linear=W8A8Timestep(timestep_sep=1)),
        QuantConfig(linear=W8A8Static(act_method="mean_minmax"), smoothing=M4()),
        QuantConfig(linear=W8A8Timestep(timestep_sep=1, act_method="mix", rows="suffix"), smoothing=M4()),
        QuantConfig(linear=W8A8Static(act_method="mean_minmax"), smoothing=M6(placement="fold")),
        QuantConfig(linear=W8A8Dynamic(), smoothing=M3(records="first")),
        QuantConfig(linear=W8A8Timestep(timestep_sep=1), calibration="sequential"),
        QuantConfig(linear=W8A8Static(act_method="mean_minmax"), smoothing=M4(), calibration="sequential"),
        QuantConfig(linear=W8A8Static(act_method="mean_minmax"), smoothing=M6(), calibration="sequential"),
        QuantConfig(linear=W8A8Static(), smoothing=M6(placement="fold"), calibration="sequential"),
    ],
    ids=[
        "dynamic",
        "timestep",
        "smoothed ranges observed anew",
        "smoothed histograms observed anew",
        "searched and folded",
        "searched on one record",
        "sequential",
        "sequential, smoothed",
        "sequential, searched",
        "sequential, searched and folded",
    ],
)
def test_a_trial_scores_its_config_and_leaves_the_float_weights_as_they_were(bench, config):
    before = {name: tensor.clone() for name, tensor in bench.model.denoiser.state_dict().items()}

    result = run_trial(bench, config, Stages(Group())).result

    after = bench.model.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.outcome == "complete"
    assert result.config_digest == digest(config)
    assert result.values == (result.metrics["clip_reference_excess"].mean, result.latency.ratio)
    assert result.metrics["psnr_db"].mean < 100.0
    assert result.weight_bytes < sum(t.numel() * t.element_size() for t in before.values())


def test_a_scale_is_searched_once_whatever_else_a_config_selects(bench, monkeypatch):
    """A second config needs nothing, a third only what no config had, and a new process what the store has."""
    fresh = dataclasses.replace(bench, cache=Store(bench.cache.root / "scales"), scales={}, stats={})
    searched: list[set[str]] = []
    original = PlanSearch.measure

    def counting(self, records, clock):
        searched.append({layer.name for unit in self._units.values() for layer in unit})
        return original(self, records, clock)

    monkeypatch.setattr(PlanSearch, "measure", counting)

    def scales_of(bench, linear, *patterns):
        config = QuantConfig(linear=linear, smoothing=M6(layers=patterns))
        plan = build_plan(bench.model.groups(), config, num_steps=2)
        calibrate(bench, Stages(Group()), plan)
        return prepare_scales(bench, plan, Stages(Group()))

    first = scales_of(fresh, W8A8Dynamic(), "*img_attn_qkv")
    again = scales_of(fresh, W8A8Static(), "*img_attn_qkv")
    wider = scales_of(fresh, W8A8Dynamic(), "*img_attn_qkv", "*linear1")
    later = scales_of(dataclasses.replace(fresh, scales={}), W8A8Dynamic(), "*img_attn_qkv", "*linear1")

    assert [sorted(names) for names in searched] == [sorted(first)] * 2 + [sorted(set(wider) - set(first))] * 2
    assert set(first) < set(wider)
    for name, scale in wider.items():
        assert torch.equal(later[name], scale)
        assert name not in first or (torch.equal(first[name], scale) and torch.equal(again[name], scale))


def test_a_fold_that_the_target_would_lose_is_refused_before_anything_is_quantized(bench):
    config = QuantConfig(
        linear=W8A8Dynamic(), smoothing=M6(placement="fold"), layers=LayerSelection(exclude=("*img_mod*",))
    )

    with pytest.raises(TrialFailed, match=r"img_mod.linear .*placement multiplier"):
        run_trial(with_config(bench, target="mindie-sd-3.1/910b"), config, Stages(Group()))


def test_statistics_of_a_sequential_trial_are_its_own_and_exported_as_they_were(bench, tmp_path):
    """Not those that trials share, which it neither uses nor makes; the export works them out again, bit by bit."""
    fresh = dataclasses.replace(bench, stats={}, cache=Store(tmp_path / "cache"))
    point = QuantConfig(linear=W8A8Static(), calibration="sequential")
    model, settings = bench.model, bench.config.workload.settings
    plan = build_plan(model.groups(), point, num_steps=settings.num_steps)
    seeds = calibration_seeds(bench.config.workload.seed, 2)
    records = capture_in_memory(model, PROMPTS.calibration, seeds, settings)
    expected = observe_sequential(model.denoiser, plan, records, model.clock).stats
    quantize_(model.denoiser, plan, expected, model.clock)
    tensors = quantized_tensors(model.denoiser)
    restore_(model.denoiser)

    found = calibrate_sequentially(fresh, plan, Stages(Group()), scales=None).stats
    study = bench.config.model_copy(update={"store": str(tmp_path / "store")})
    exported = export_config(study, PROMPTS, point, tmp_path / "export", shape=ExportShape(layout="diffusers"))
    load_quantized(model.denoiser, exported.folder, model.clock)
    loaded = quantized_tensors(model.denoiser)
    restore_(model.denoiser)

    assert fresh.stats == {}
    assert all(stored_stats(fresh, histograms=histograms) is None for histograms in (False, True))
    assert all(torch.equal(found[name].hi, group.hi) for name, group in expected.items())
    assert exported.report.ok
    for path, layer in tensors.items():
        assert torch.equal(loaded[path]["input_scale"], layer["input_scale"]), path


def test_a_trial_that_breaks_a_bound_has_constraints_but_no_values_and_is_not_timed(bench):
    strict = with_config(bench, constraints=(Constraint(metric="psnr_db", min=99.0),))

    result = run_trial(strict, QuantConfig(linear=W8A8Dynamic()), Stages(Group())).result

    assert result.outcome == "infeasible"
    assert result.values is None
    assert result.latency is None
    assert result.constraints["psnr_db"] == pytest.approx(99.0 - result.metrics["psnr_db"].mean)
    assert "psnr_db must be at least 99" in result.reason


def test_a_layer_pattern_that_matches_nothing_fails_the_stage_with_its_sentence(bench):
    config = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(exclude=("*nothing*",)))

    with pytest.raises(TrialFailed, match=r"stage quantize on rank 0: .*nothing") as caught:
        run_trial(bench, config, Stages(Group()))

    assert caught.value.stage == "quantize"
    assert "LayerMatchError" in caught.value.log


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("x"), "ours"),
        (torch.OutOfMemoryError("x"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (PermissionError(errno.EACCES, "Permission denied"), "bug"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "bug"),
        (KeyError("x"), "bug"),
    ],
    ids=["ours", "accelerator memory", "host memory", "disk", "another OSError", "another RuntimeError", "a bug"],
)
def test_only_our_errors_out_of_memory_and_full_disks_fail_a_trial_alone(error, expected):
    assert kind_of(error) == expected


def test_out_of_memory_of_a_real_allocation_fails_the_stage():
    with pytest.raises(TrialFailed, match="stage render on rank 0: out of memory"):
        Stages(Group()).run("render", lambda: torch.empty(2**60, dtype=torch.uint8))


def test_a_bug_is_no_answer_that_anybody_handles():
    """Not even one that looks like what a store says: `store_errors` would make it a reason to stop the slot."""

    def denied():
        raise PermissionError(errno.EACCES, "Permission denied", "/a/folder")

    with pytest.raises(StageBug) as caught, store_errors(Path("store")):
        Stages(Group()).run("render", denied)

    assert str(caught.value) == ("stage render on rank 0: PermissionError: [Errno 13] Permission denied: '/a/folder'")
    assert isinstance(caught.value.__cause__, PermissionError)
    assert "in denied" in caught.value.log


@pytest.mark.parametrize("end", [optuna.TrialPruned(), UpdateFinishedTrialError()])
def test_what_ends_a_trial_passes_through_a_stage(end):
    def work():
        raise end

    with pytest.raises(type(end)) as caught:
        Stages(Group()).run("suggest", work)

    assert caught.value is end


def test_each_record_is_observed_once_whether_it_was_captured_now_or_before(bench, tmp_path):
    """Capturing runs the denoiser too; it must be over before the denoiser is watched."""
    cold = dataclasses.replace(bench, cache=Store(tmp_path), stats={})

    first, again = observe_shard(cold, histograms=False), observe_shard(cold, histograms=False)

    num_prompts = len(PROMPTS.calibration)
    assert all(stats.calls.tolist() == [num_prompts] * 2 for stats in first.values())
    assert all(torch.equal(first[name].sum_hi, again[name].sum_hi) for name in first)


def test_statistics_are_stored_for_the_next_worker(bench):
    plan = plan_for(bench, QuantConfig(linear=W8A8Static()))
    calibrate(bench, Stages(Group()), plan)

    stored = stored_stats(bench, histograms=wants_histograms(bench, plan))

    assert stored.keys() == bench.stats.keys()
    assert all(torch.equal(stored[name].lo, bench.stats[name].lo) for name in stored)


def test_statistics_with_histograms_are_gathered_when_a_plan_first_asks_for_them(bench, tmp_path):
    """The space has no act_method that needs them, as if someone tried a config of his own."""
    plain = dataclasses.replace(with_space(bench), cache=Store(tmp_path), stats={})
    minmax, histogram = (plan_for(bench, QuantConfig(linear=W8A8Static(act_method=m))) for m in ("minmax", "histogram"))

    calibrate(plain, Stages(Group()), minmax)
    before = dict(plain.stats)
    calibrate(plain, Stages(Group()), histogram)
    after = dict(plain.stats)
    calibrate(plain, Stages(Group()), minmax)

    assert all(group.histogram is None for group in before.values())
    assert all(int(group.histogram.counts.sum()) > 0 for group in after.values())
    assert all(torch.equal(before[name].lo, after[name].lo) for name in before)
    assert plain.stats == after  # richer statistics serve every plan
    assert all(group.histogram is None for group in stored_stats(plain, histograms=False).values())
    stored = stored_stats(plain, histograms=True)
    assert all(torch.equal(stored[name].histogram.counts, after[name].histogram.counts) for name in after)


@pytest.mark.parametrize(
    ("space", "config", "expected"),
    [
        ({"act_methods": ("minmax", "mix")}, W8A8Static(), True),
        ({"act_methods": ("minmax", "mix"), "strategies": ("dynamic", "m4")}, W8A8Static(), False),
        ({"percentiles": ("none", 0.999)}, W8A8Static(), True),
        ({}, W8A8Static(), False),
        ({}, W8A8Static(percentile=0.999), True),
    ],
    ids=["a method of the space", "a method no strategy uses", "a percentile of the space", "neither", "the plan"],
)
def test_histograms_are_wanted_where_the_space_or_the_plan_can_need_them(bench, space, config, expected):
    own = with_space(bench, **space)

    assert wants_histograms(own, plan_for(bench, QuantConfig(linear=config))) is expected


@pytest.fixture
def make_leader(bench, mlflow_store):
    """A leader of a fresh study; keyword arguments change the study's config."""

    def make(embedder=bench.embedder, until_trial=None, max_trials=None, **changes):
        config = bench.config.model_copy(update={"store": str(mlflow_store), **changes})
        study, _ = create_study(mlflow_store, config, PROMPTS)
        Tracker.of(mlflow_store, study).open_study(config)
        order = WorkOrder(
            store=mlflow_store,
            url=None,
            study=config.name,
            slot=0,
            first_trial=0,
            deadline=None,
            until_trial=until_trial,
            max_trials=max_trials,
        )
        own_bench = dataclasses.replace(bench, config=config, embedder=embedder)
        leader = Leader(own_bench, study, order, restart_count=4)
        return leader, study, order

    return make


def test_a_grid_is_tried_to_its_end_and_is_done_then_though_the_budget_is_not_used(make_leader):
    space = SearchSpace(name="s", strategies=("dynamic",), exclusions={"none": (), "fc2": ("*fc2*",)})
    leader, study, _ = make_leader(space=space, sampler=SamplerConfig(kind="grid"), budget=Budget(trials=9))

    reason = leader.run()

    assert reason == why_over(study, stored_config(study)) == "every point of the space has been tried"
    assert sorted(trial_state(trial) for trial in study.trials) == ["complete", "complete"]


def test_a_worker_of_so_many_trials_leaves_after_them_though_its_group_started_anew(bench, make_leader):
    leader, study, order = make_leader(max_trials=2, budget=Budget(trials=9))
    reason = leader.run()
    again = Leader(dataclasses.replace(bench, config=stored_config(study)), study, order, restart_count=5)

    assert reason == again.run() == "its 2 trials are done"
    assert len(study.trials) == 2


def test_a_leader_runs_the_budget_answers_duplicates_and_logs_all_to_mlflow(make_leader):
    leader, study, order = make_leader(budget=Budget(trials=2))
    for strategy in ("dynamic", "dynamic", "static"):
        act_method = {"act_method": "minmax"} if strategy == "static" else {}
        study.enqueue_trial({"strategy": strategy, "exclusion": "none", **act_method})

    reason = leader.run()

    assert "budget of 2" in reason
    assert [trial_state(trial) for trial in study.trials] == ["complete", "reused", "complete"]
    first, again, _ = study.trials
    assert again.values == first.values
    assert trial_config(again) == trial_config(first)
    assert again.constraints == first.constraints
    assert trial_reason(again) == "the same config as trial 0"
    assert agreement(order.store, study) == ()
    assert read_state(slot_folder(order.store, order.study, 0)).restarts_at_last_finish == 4


def test_a_hand_written_config_is_run_before_what_waits_and_nothing_after_it(make_leader):
    leader, study, _ = make_leader(until_trial=1)
    study.enqueue_trial({"strategy": "static", "exclusion": "none", "act_method": "minmax"})
    enqueue_point(study, QuantConfig(linear=W8A8Dynamic()))

    reason = leader.run()

    assert reason == "trial 1 has finished"
    assert [trial_state(trial) for trial in study.trials] == ["waiting", "complete"]


def test_the_stage_times_of_a_run_add_up_to_its_wall_time(make_leader):
    leader, study, _ = make_leader(budget=Budget(trials=1))

    leader.run()

    seconds = trial_result(study.trials[0]).stage_seconds
    assert {"quantize", "render", "score", "latency", "wait", "overhead"} <= seconds.keys()
    assert seconds.keys() - {"wait", "overhead"} <= {*STAGES}, "a stage without a name in `timeouts.stages`"
    assert all(value >= 0 and math.isfinite(value) for value in seconds.values())


def test_a_failed_trial_says_where_and_why_and_the_study_goes_on(make_leader):
    leader, study, order = make_leader(budget=Budget(trials=1))
    enqueue_point(study, QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(exclude=("*nothing*",))))

    leader.run()

    failed, complete = study.trials
    assert (trial_state(failed), trial_state(complete)) == ("failed", "complete")
    assert failed.user_attrs["stage"] == "quantize"
    assert "'*nothing*'" in trial_reason(failed)
    assert agreement(order.store, study) == ()


def test_an_infeasible_trial_counts_and_keeps_its_result(make_leader):
    leader, study, _ = make_leader(budget=Budget(trials=1), constraints=(Constraint(metric="psnr_db", min=99.0),))

    leader.run()

    (trial,) = study.trials
    assert trial_state(trial) == "infeasible"
    assert trial.values is None
    assert trial.constraints["psnr_db"] > 0
    assert "psnr_db" in trial_reason(trial)


def test_a_bug_is_written_into_the_trial_and_ends_the_worker(make_leader):
    leader, study, order = make_leader(budget=Budget(trials=1), embedder=object())

    with pytest.raises(StageBug, match="AttributeError"):
        leader.run()

    (trial,) = study.trials
    assert trial_state(trial) == "failed"
    assert trial.user_attrs["stage"] in ("judge", "score")  # float clips may have been scored by another test
    assert "AttributeError" in trial_reason(trial)
    assert "score_samples" in trial.user_attrs["log"]
    assert agreement(order.store, study) == ()


def test_duplicates_in_a_row_are_broken_by_random_points(make_leader):
    """A queue of equal points stands for a sampler that has converged."""
    leader, study, _ = make_leader(budget=Budget(trials=2))
    for _ in range(DUPLICATES_BEFORE_RANDOM + 1):
        study.enqueue_trial({"strategy": "dynamic", "exclusion": "none"})

    leader.run()

    counts = count_states(study)
    assert counts["complete"] + counts["infeasible"] == 2
    assert counts["reused"] >= DUPLICATES_BEFORE_RANDOM
