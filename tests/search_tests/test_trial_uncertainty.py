"""What a trial says about latents and about how sure its numbers are: stored, shown, drawn and logged."""

import dataclasses
from statistics import fmean

import optuna
import pytest
import torch
from mlflow import MlflowClient

from hyquant.config import QuantConfig, W8A8Dynamic
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from hyquant.models.tiny import TinyVideoModel
from search.answers import table_row, trial_json, trial_lines
from search.leader import Leader
from search.locks import HostLock
from search.logged import result_metrics
from search.mlflow_client import tracking_uri
from search.objective import run_trial
from search.order import WorkOrder
from search.overview import read_overview
from search.plot_data import front_plot
from search.prepare import prepare_judge, prepare_workbench
from search.prompts import StudyPrompts
from search.report import write_study_report
from search.result import TrialResult
from search.stages import Stages
from search.storage import create_study, stored_floor
from search.study import Budget, Constraint, Objective
from search.tracking import Tracker
from search.trials import trial_result, trial_state

PROMPTS = StudyPrompts(calibration=("one red cube",), search=("a green cone", "a grey ring", "two tall blue boxes"))
EXCESS_OBJECTIVES = (
    Objective(metric="clip_reference_excess", direction="minimize"),
    Objective(metric="latency_ratio", direction="minimize"),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bench(cache, study_config):
    workload = study_config.workload.model_copy(update={"num_search_prompts": 3})
    config = study_config.model_copy(update={"workload": workload})
    return prepare_workbench(
        config, PROMPTS, group=Group(), device=resolve_device("cpu"), cache=cache, lock=HostLock(cache / "locks")
    )


@pytest.fixture(scope="module")
def int8(bench):
    return run_trial(bench, QuantConfig(linear=W8A8Dynamic()), Stages(Group())).result


def test_latents_of_the_float_control_are_those_of_the_float_videos(bench, int8):
    control = run_trial(bench, QuantConfig(linear=None), Stages(Group())).result

    assert control.latent_l2 == ((0.0, 0.0),) * 3
    assert len(int8.latent_l2) == 3
    assert all(0.0 < error < 0.5 for curve in int8.latent_l2 for error in curve)


def test_a_latent_error_is_logged_by_step_and_as_a_figure(int8):
    logged = [(metric.name, metric.step, metric.value) for metric in result_metrics(int8)]
    by_hand = [fmean(curve[step] for curve in int8.latent_l2) for step in range(2)]

    assert [value for name, _, value in logged if name == "latent_l2_by_step"] == pytest.approx(by_hand)
    assert [value for name, _, value in logged if name == "latent_l2"] == pytest.approx(by_hand[-1:])
    low, high = (next(v for name, _, v in logged if name == f"psnr_db_{end}") for end in ("low", "high"))
    assert low <= int8.metrics["psnr_db"].mean <= high


def test_a_bound_on_latents_is_held_before_anything_is_timed(bench):
    config = bench.config.model_copy(update={"constraints": (Constraint(metric="latent_l2", max=1e-9),)})

    result = run_trial(
        dataclasses.replace(bench, config=config), QuantConfig(linear=W8A8Dynamic()), Stages(Group())
    ).result

    assert result.outcome == "infeasible"
    assert "latent_l2 must be at most 1e-09" in result.reason
    assert result.latency is None


def test_every_metric_and_the_latency_have_an_interval_around_their_value(int8):
    for metric in int8.metrics.values():
        assert min(metric.values) <= metric.interval[0] <= metric.mean <= metric.interval[1] <= max(metric.values)
    low, high = int8.latency.ratio_interval
    assert 0.0 < low <= high


def test_a_result_stored_before_there_were_intervals_opens(int8):
    stored = int8.model_dump(mode="json", exclude={"latent_l2"})
    for metric in stored["metrics"].values():
        del metric["interval"]
    del stored["latency"]["ratio_interval"]

    old = TrialResult.model_validate(stored)

    assert old.latent_l2 == ()
    assert old.metrics["ssim"].interval is None
    assert old.latency.ratio_interval is None


def test_a_second_study_on_the_same_workload_renders_no_float_video(bench, int8, cache, monkeypatch):
    other = prepare_workbench(
        bench.config.model_copy(update={"name": "another"}),
        PROMPTS,
        group=Group(),
        device=resolve_device("cpu"),
        cache=cache,
        lock=HostLock(cache / "locks"),
    )
    monkeypatch.setattr(TinyVideoModel, "_denoise", lambda *_, **__: pytest.fail("was rendered again"))

    prepare_judge(other, Stages(Group()))

    assert all(torch.equal(*pair) for pair in zip(other.references, bench.references, strict=True))
    assert other.float_traces.keys() == bench.float_traces.keys()


@pytest.fixture(scope="module")
def excess_study(bench, mlflow_template, tmp_path_factory):
    """A study of two trials over excess and latency, run by a leader."""
    import shutil

    store = tmp_path_factory.mktemp("study") / "mlruns"
    shutil.copytree(mlflow_template, store)
    config = bench.config.model_copy(
        update={"store": str(store), "objectives": EXCESS_OBJECTIVES, "budget": Budget(trials=2), "constraints": ()}
    )
    study, _ = create_study(store, config, PROMPTS)
    Tracker.of(store, study).open_study(config)
    for strategy in ("dynamic", "m4"):
        study.enqueue_trial({"strategy": strategy, "exclusion": "none"})
    order = WorkOrder(store=store, url=None, study=config.name, slot=0, first_trial=0, deadline=None, until_trial=None)
    Leader(dataclasses.replace(bench, config=config), study, order, restart_count=0).run()
    return store, study


def test_a_study_over_an_excess_runs_picks_and_plots(excess_study, bench, tmp_path):
    _, study = excess_study

    overview = read_overview(study)
    plot = front_plot(overview)
    write_study_report(tmp_path, overview.config, study)

    assert [trial_state(trial) for trial in study.trials] == ["complete", "complete"]
    result = trial_result(study.trials[0])
    floor = bench.floor.metrics["clip_reference"]
    expected = [
        abs(value - best) - noise
        for value, best, noise in zip(
            result.metrics["clip_reference"].values, floor.perfect, floor.distances, strict=True
        )
    ]
    assert result.values[0] == pytest.approx(fmean(expected))
    assert overview.picked("safe") is not None
    assert plot.y.label == "clip reference excess, log scale, up is better"
    assert all(point.x_interval is not None and point.y_interval is not None for point in plot.front)
    assert {"front.png", "front.html", "latent_l2.png"} <= {path.name for path in tmp_path.iterdir()}
    assert '"arrayminus"' in (tmp_path / "front.html").read_text()


def test_the_floor_is_kept_with_the_study_and_logged_to_its_run(excess_study, bench):
    store, study = excess_study
    client = MlflowClient(tracking_uri=tracking_uri(store))
    experiment = client.get_experiment_by_name(study.study_name)
    runs = client.search_runs([experiment.experiment_id], "tags.`hyq.study` != ''")

    (parent,) = runs

    assert stored_floor(study) == bench.floor
    assert parent.data.metrics["noise_floor.psnr_db"] == pytest.approx(bench.floor.metrics["psnr_db"].mean)


def test_lines_and_tables_show_intervals_floor_latents_and_memory(excess_study):
    _, study = excess_study
    overview = read_overview(study)
    row = overview.rows[0]

    text = "\n".join(trial_lines(row, overview.floor))

    assert row.interval("clip_reference_excess") == row.result.metrics["clip_reference_excess"].interval
    assert "[" in table_row(row, overview.config.space)["clip_reference_excess"]
    assert "[" in table_row(row, overview.config.space)["latency_ratio"]
    assert "noise floor, of float under batch split, math attention, split sums" in text
    assert "latents: relative L2 error" in text
    assert "peak" in text
    answer = trial_json(row)
    assert answer["intervals"]["latency_ratio"] == list(row.result.latency.ratio_interval)
    assert answer["peak_memory_bytes"] == row.result.peak_memory_bytes


def test_the_interval_of_seconds_is_that_of_the_ratio_in_seconds(excess_study):
    row = read_overview(excess_study[1]).rows[0]
    latency = row.result.latency

    assert row.interval("latency_s") == pytest.approx(
        [end * latency.control_loop_latency_s for end in latency.ratio_interval]
    )
    assert row.interval("weight_bytes") is None


def test_studies_without_a_floor_are_shown_as_before(filled_study):
    overview = read_overview(filled_study)

    assert overview.floor is None
    assert not any("noise floor" in line for line in trial_lines(overview.rows[0], overview.floor))
    assert isinstance(filled_study, optuna.Study)
