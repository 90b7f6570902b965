import logging
import sqlite3
import time

import pytest

from search.errors import StoreError
from search.logged import config_params, result_metrics
from search.mlflow_client import prepare_store, tracking_uri
from search.provenance import Provenance
from search.run_log import PARENT_TAG
from search.tracking import Tracker
from spaces.strategy import strategy_of


@pytest.fixture
def tracker(mlflow_store, small_study) -> Tracker:
    opened = Tracker(mlflow_store, "demo")
    opened.open_study(small_study)
    return opened


def client_of(store):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(store))


def test_a_trial_becomes_a_child_run_with_params_metrics_and_files(
    small_study, tracker, mlflow_store, make_result, tmp_path
):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tracker.start_trial(7)
    tracker.finish_trial(7, "complete", make_result("timestep"), files=folder)
    (run,) = tracker.trial_runs()
    raw = client_of(mlflow_store).get_run(run.run_id)

    assert (run.number, run.status, run.state) == (7, "FINISHED", "complete")
    assert raw.data.tags[PARENT_TAG] == tracker.open_study(small_study)
    assert raw.data.params["strategy"] == "timestep"
    assert raw.data.params["linear.timestep_sep"] == "2"
    assert raw.data.metrics["clip_reference_mean"] == pytest.approx(0.9)
    assert raw.data.metrics["loop_latency_s"] == pytest.approx(1.6)
    history = client_of(mlflow_store).get_metric_history(run.run_id, "psnr_db_by_prompt")
    assert [(m.step, m.value) for m in history] == [(0, 30.0), (1, 32.0)]
    assert (mlflow_store / "artifacts" / run.run_id / "artifacts" / "config.json").read_text() == "{}"


def test_what_a_result_rests_on_stands_in_its_run(tracker, mlflow_store, make_result):
    provenance = Provenance(
        code="1234abcd",
        packages={"torch": "2.14.1"},
        device="cpu x86",
        drivers={"ascend driver": "24.1"},
        environment={"HCCL_CONNECT_TIMEOUT": "600"},
        seed=42,
        digests={"model": "aabb"},
    )
    tracker.finish_trial(0, "complete", make_result(provenance=provenance))
    (run,) = tracker.trial_runs()
    tags = client_of(mlflow_store).get_run(run.run_id).data.tags

    assert tags["mlflow.source.git.commit"] == "1234abcd"
    assert {key.removeprefix("hyq.from."): tags[key] for key in tags if key.startswith("hyq.from.")} == {
        "code": "1234abcd",
        "device": "cpu x86",
        "seed": "42",
        "torch": "2.14.1",
        "ascend driver": "24.1",
        "HCCL_CONNECT_TIMEOUT": "600",
        "model digest": "aabb",
    }


def test_logging_a_trial_twice_changes_nothing(tracker, mlflow_store, make_result):
    for _ in range(2):
        tracker.finish_trial(0, "complete", make_result())
    (run,) = tracker.trial_runs()

    assert len(client_of(mlflow_store).get_metric_history(run.run_id, "clip_reference_mean")) == 1


def test_opening_a_study_again_finds_the_same_parent_run(small_study, tracker, mlflow_store):
    again = Tracker(mlflow_store, "demo")

    assert again.open_study(small_study) == tracker.open_study(small_study)


def test_a_worker_finds_the_study_the_runner_opened(tracker, mlflow_store):
    worker = Tracker(mlflow_store, "demo")
    worker.start_trial(0)

    assert [(run.number, run.status) for run in tracker.trial_runs()] == [(0, "RUNNING")]


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("complete", "FINISHED"),
        ("infeasible", "FINISHED"),
        ("reused", "FINISHED"),
        ("stopped", "KILLED"),
        ("failed", "FAILED"),
    ],
)
def test_a_state_has_one_run_status(tracker, state, status):
    tracker.finish_trial(0, state, None, reason="because")

    assert tracker.trial_runs()[0].status == status


def test_logging_one_trial_costs_well_under_a_second(tracker, make_result):
    """Of computing: what the disk takes to write it down, and what else the machine does, is none of the tracker's."""
    tracker.finish_trial(0, "complete", make_result())
    start = time.process_time()
    tracker.start_trial(1)
    tracker.finish_trial(1, "complete", make_result())

    assert time.process_time() - start < 1.0


def test_an_unreachable_store_warns_once_and_fails_no_trial(tmp_path, make_result, caplog):
    tracker = Tracker(tmp_path / "nowhere", "demo")
    with caplog.at_level(logging.WARNING, logger="search.tracking"):
        tracker.start_trial(0)
        tracker.finish_trial(0, "complete", make_result())

    assert len(caplog.records) == 1
    assert "a store must hold mlflow.db" in caplog.text
    assert not (tmp_path / "nowhere").exists()


def test_a_study_that_a_store_does_not_know_may_be_on_a_server(mlflow_store):
    with pytest.raises(StoreError, match="give --tracking-uri if its record is on a server"):
        Tracker(mlflow_store, "elsewhere").trial_runs()


def test_a_locked_database_is_one_clear_sentence(mlflow_store, monkeypatch):
    holder = sqlite3.connect(mlflow_store / "mlflow.db")
    holder.execute("BEGIN IMMEDIATE")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0.1))
    with pytest.raises(StoreError, match=r"must be writable, but .*mlflow\.db gave 'database is locked'; close"):
        prepare_store(mlflow_store)
    holder.close()


def test_a_file_that_is_no_database_is_one_clear_sentence(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is a shopping list, and a long one at that" * 40)

    with pytest.raises(StoreError, match="file is not a database"):
        prepare_store(tmp_path)


def test_usage_pings_are_off(small_study, mlflow_store):
    Tracker(mlflow_store, "demo").open_study(small_study)
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()


def test_metric_names_carry_units_and_are_unique_per_step(make_result):
    logged = result_metrics(make_result())

    assert len({(m.name, m.step) for m in logged}) == len(logged)
    assert {"psnr_db_mean", "latency_ratio", "step_latency_s.dynamic", "stage_s.render", "weight_size_bytes"} <= {
        m.name for m in logged
    }


@pytest.mark.parametrize("strategy", ["static", "dynamic", "timestep", "m4"])
def test_a_config_names_its_strategy(make_result, strategy):
    config = make_result(strategy).config

    assert strategy_of(config) == strategy
    assert config_params(config)["strategy"] == strategy


def test_runs_are_read_page_by_page(tracker, monkeypatch):
    monkeypatch.setattr("search.study_run._PAGE", 2)
    for number in range(5):
        tracker.start_trial(number)

    assert sorted(run.number for run in tracker.trial_runs()) == [0, 1, 2, 3, 4]
