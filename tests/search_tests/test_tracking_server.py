"""The record on a real MLflow server, which is started once and killed where a test says so."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.trial import create_trial

from search.errors import StoreError
from search.logged import LoggedMetric
from search.repair import agreement, repair
from search.run_log import study_log, trial_log
from search.spool import Spool
from search.tracking import Tracker
from tests.toys.mlflow_server import mlflow_server
from tests.toys.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.multiproc]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = mlflow_server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def study(request, small_study):
    """A config of a name of its own, because all tests share one server."""
    return small_study.model_copy(update={"name": request.node.name[:90]})


def client_of(server):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.url)


def dead_uri() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_a_server_keeps_runs_and_files_and_the_store_holds_neither(server, study, files, make_result, tmp_path):
    tracker = Tracker(tmp_path / "store", study.name, server.url)
    tracker.open_study(study)
    tracker.start_trial(3)
    tracker.finish_trial(3, "complete", make_result(), files=files)
    (run,) = tracker.trial_runs()
    fetched = Path(client_of(server).download_artifacts(run.run_id, "videos.mp4", str(tmp_path)))

    assert (run.number, run.status, run.state) == (3, "FINISHED", "complete")
    assert fetched.read_bytes() == b"a video"
    assert list(Spool(tmp_path / "store", study.name).waiting()) == []
    assert not (tmp_path / "store" / "mlflow.db").exists()
    assert not (tmp_path / "store" / "artifacts").exists()


def test_hosts_that_open_a_study_at_once_get_one_parent_run(server, study, tmp_path):
    trackers = [Tracker(tmp_path / f"host{index}", study.name, server.url) for index in range(6)]
    start = threading.Barrier(len(trackers))

    def open_study(tracker):
        start.wait()
        return tracker.open_study(study)

    with ThreadPoolExecutor(len(trackers)) as pool:
        parents = set(pool.map(open_study, trackers))
    client = client_of(server)
    experiment = client.get_experiment_by_name(study.name)

    assert len(parents) == 1
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_a_host_that_comes_second_to_the_studys_params_leaves_them_as_they_are(server, study, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import RestException

    log_batch, refusals = MlflowClient.log_batch, []

    def after_another_host(client, run_id, **batch):
        log_batch(client, run_id, **batch)
        if batch.get("params"):
            refusals.append(run_id)
            raise RestException({"error_code": "BAD_REQUEST", "message": "UNIQUE constraint failed: params.key"})

    monkeypatch.setattr(MlflowClient, "log_batch", after_another_host)
    run_id = Tracker(tmp_path / "store", study.name, server.url).open_study(study)
    data = client_of(server).get_run(run_id).data

    assert refusals == [run_id]
    assert data.params == study_log(study).params
    assert "hyq.study" in data.tags


def test_params_that_nobody_could_log_are_an_error(server, study, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import RestException

    log_batch = MlflowClient.log_batch

    def without_params(client, run_id, **batch):
        if batch.get("params"):
            raise RestException({"error_code": "BAD_REQUEST", "message": "no"})
        log_batch(client, run_id, **batch)

    monkeypatch.setattr(MlflowClient, "log_batch", without_params)
    with pytest.raises(StoreError, match="must answer, but gave 'BAD_REQUEST: no'"):
        Tracker(tmp_path / "store", study.name, server.url).open_study(study)


def test_what_a_dead_server_misses_is_sent_with_its_videos_when_it_is_back(study, files, make_result, tmp_path, caplog):
    folder = tmp_path / "server"
    folder.mkdir()
    server = mlflow_server(folder)
    server.start()
    now = [0.0]
    tracker = Tracker(tmp_path / "store", study.name, server.url, clock=lambda: now[0])
    parent = tracker.open_study(study)
    server.kill()
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="search.tracking"):
        for number in range(5):
            tracker.start_trial(number)
            tracker.finish_trial(number, "complete", make_result(), files=files)
        tracker.log_study([LoggedMetric("noise_floor.psnr_db", 40.0)])
    away_s = time.monotonic() - started
    server.start()
    silent = tracker.deliver()
    now[0] += 60.0
    remaining = tracker.deliver()
    again = tracker.deliver()
    runs = tracker.trial_runs()
    client = client_of(server)
    held = {run.number: [file.path for file in client.list_artifacts(run.run_id)] for run in runs}
    floor = client.get_run(parent).data.metrics
    server.kill()

    assert away_s < 90  # asked once, and refused; MLflow itself would ask eight times, and pause for minutes
    assert len(caplog.records) == 1
    assert (silent, remaining, again) == (6, 0, 0)
    assert held == {number: ["videos.mp4"] for number in range(5)}
    assert {(run.status, run.state) for run in runs} == {("FINISHED", "complete")}
    assert floor == {"noise_floor.psnr_db": 40.0}


def test_a_log_that_was_sent_before_its_sender_died_changes_nothing_when_sent_again(
    server, study, files, make_result, tmp_path
):
    tracker = Tracker(tmp_path / "store", study.name, server.url)
    tracker.open_study(study)
    log = trial_log(0, "complete", make_result())
    tracker.send(log, files)
    Spool(tmp_path / "store", study.name).add("trial-0", log, files)
    remaining = tracker.deliver()
    (run,) = tracker.trial_runs()

    assert remaining == 0
    assert len(client_of(server).get_metric_history(run.run_id, "clip_reference_mean")) == 1


def _spool_and_hang(store, name, log, files, is_there):
    Spool(store, name).add("trial-0", log, files)
    is_there.set()
    time.sleep(600)


def test_a_spooled_log_survives_the_kill_of_its_process(server, study, files, make_result, tmp_path):
    context = multiprocessing.get_context("fork")
    is_there = context.Event()
    arguments = (tmp_path / "store", study.name, trial_log(0, "complete", make_result()), files, is_there)
    process = context.Process(target=_spool_and_hang, args=arguments)
    process.start()
    assert is_there.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    tracker = Tracker(tmp_path / "store", study.name, server.url)
    tracker.open_study(study)

    assert tracker.deliver() == 0
    assert [run.number for run in tracker.trial_runs()] == [0]


def test_repair_sends_the_spool_before_it_makes_up_for_what_is_missing(server, study, files, make_result, tmp_path):
    result = make_result()
    stored = optuna.create_study(study_name=study.name, directions=["maximize", "minimize"])
    for _ in range(2):
        stored.add_trial(create_trial(values=result.values, user_attrs={"result": result.model_dump(mode="json")}))
    tracker = Tracker(tmp_path / "store", study.name, server.url)
    tracker.open_study(study)
    Spool(tmp_path / "store", study.name).add("trial-0", trial_log(0, "complete", result), files)
    found = repair(tmp_path / "store", stored, server.url)
    held = {run.number: len(client_of(server).list_artifacts(run.run_id)) for run in tracker.trial_runs()}

    assert found.corrected == ("trial 1 has no MLflow run",)
    assert held == {0: 1, 1: 0}
    assert agreement(tmp_path / "store", stored, server.url) == ()


def test_a_password_in_the_address_of_a_dead_server_is_not_shown(study, tmp_path):
    uri = dead_uri().replace("http://", "http://hyq:secret@")
    with pytest.raises(StoreError) as caught:
        Tracker(tmp_path, study.name, uri).open_study(study)

    assert "secret" not in str(caught.value)
    assert "hyq:***@127.0.0.1" in str(caught.value)
