"""What the tracker does about a server that never answers, refuses, or is away, and about a spool that was damaged."""

import math
import os
import shutil
import socket
import time
from contextlib import ExitStack, suppress

import pytest

from search.logged import LoggedMetric
from search.run_log import RunLog
from search.spool import Spool
from search.tracking import Tracker
from tests.toys.mlflow_server import mlflow_server


@pytest.fixture
def tracker(mlflow_store, small_study):
    tracker = Tracker(mlflow_store, "demo")
    tracker.open_study(small_study)
    return tracker


@pytest.fixture
def spool(mlflow_store):
    return Spool(mlflow_store, "demo")


@pytest.fixture
def black_hole():
    """A server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener


def num_connections(listener):
    """Return how many connections wait to be answered by a server that has answered none."""
    listener.setblocking(False)
    count = 0
    with suppress(BlockingIOError), ExitStack() as accepted:
        while True:
            accepted.enter_context(listener.accept()[0])
            count += 1
    return count


def make_old(path):
    for part in (path, *path.rglob("*")):
        os.utime(part, (time.time() - 7200,) * 2)


@pytest.mark.slow
def test_a_server_that_accepts_and_never_answers_costs_a_study_seconds(black_hole, small_study, make_result, tmp_path):
    """It is asked once, and given up after 5 s, where MLflow itself would wait for 120 s, eight times."""
    tracker = Tracker(tmp_path, "demo", f"http://127.0.0.1:{black_hole.getsockname()[1]}", clock=lambda: 0.0)
    started = time.monotonic()
    tracker.start_study(small_study)
    for number in range(5):
        tracker.start_trial(number)
        tracker.finish_trial(number, "complete", make_result())

    assert time.monotonic() - started < 90
    assert num_connections(black_hole) == 1
    assert len(list(Spool(tmp_path, "demo").waiting())) == 6


def test_a_server_that_stays_away_is_asked_ever_more_rarely(small_study, tmp_path, monkeypatch):
    now, tries = [0.0], []

    def refuse(*_):
        tries.append(now[0])
        raise ConnectionError("nobody there")

    monkeypatch.setattr("search.tracking.connect", refuse)
    tracker = Tracker(tmp_path, "demo", "http://127.0.0.1:9", clock=lambda: now[0])
    for _ in range(360):
        tracker.start_trial(0)
        now[0] += 10.0

    assert tries == [0.0, 30.0, 90.0, 210.0, 450.0, 930.0, 1530.0, 2130.0, 2730.0, 3330.0]


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_study_that_starts_without_its_server_is_there_when_the_server_is(small_study, make_result, files, tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    server = mlflow_server(folder)
    now = [0.0]
    tracker = Tracker(tmp_path / "store", "demo", server.url, clock=lambda: now[0])
    tracker.start_study(small_study)
    tracker.finish_trial(0, "complete", make_result(), files=files)
    server.start()
    try:
        now[0] += 60.0
        remaining = tracker.deliver()
        runs = tracker.trial_runs()
        parent = Tracker(tmp_path / "other host", "demo", server.url).open_study(small_study)
        from mlflow import MlflowClient

        params = MlflowClient(tracking_uri=server.url).get_run(parent).data.params
    finally:
        server.kill()

    assert remaining == 0
    assert [(run.number, run.status) for run in runs] == [(0, "FINISHED")]
    assert params["space"] == small_study.space.name


def test_what_mlflow_refuses_for_good_is_set_aside_and_what_follows_is_sent(tracker, spool, files):
    spool.add("trial-0", RunLog(number=0, params={"alpha": "1"}))
    spool.add("trial-0", RunLog(number=0, params={"alpha": "2"}), files)  # MLflow keeps the first value of a parameter
    spool.add("trial-1", RunLog(number=1, metrics=(LoggedMetric("ssim", 0.9),)))
    remaining = tracker.deliver()
    ((folder, why),) = spool.kept_aside()

    assert remaining == 0
    assert "alpha" in why
    assert (folder / "files" / "videos.mp4").read_bytes() == b"a video"
    assert [run.metrics for run in tracker.trial_runs() if run.number == 1] == [{"ssim": 0.9}]


def test_a_damaged_log_is_set_aside_with_its_files(tracker, spool, files):
    spool.add("trial-7", RunLog(number=7), files)
    (folder,) = spool.folder.glob("[0-9]*")
    (folder / "log.json").write_bytes(b'{"number": ')
    tracker.deliver()
    ((aside, _),) = spool.kept_aside()

    assert list(spool.waiting()) == []
    assert (aside / "files" / "videos.mp4").read_bytes() == b"a video"


def test_what_killed_processes_left_in_the_spool_is_swept_and_what_is_being_written_is_not(tracker, spool, files):
    spool.add("trial-7", RunLog(number=7), files)
    (sent,) = spool.folder.glob("[0-9]*")
    (sent / "log.json").unlink()  # as a sender that was killed between the log and its files
    killed, busy = spool.folder / ".new-killed", spool.folder / ".new-busy"
    shutil.copytree(files, killed / "new")
    shutil.copytree(files, busy / "new")
    make_old(sent)
    make_old(killed)
    tracker.deliver()

    assert [path.name for path in spool.folder.iterdir()] == [".new-busy"]


def test_files_that_cannot_be_uploaded_leave_an_ended_run_and_wait(tracker, spool, files, mlflow_store, make_result):
    shutil.rmtree(mlflow_store / "artifacts")
    (mlflow_store / "artifacts").write_text("in the way")
    tracker.finish_trial(0, "complete", make_result(), files=files)
    (run,) = tracker.trial_runs()
    waiting = [(spooled.log.number, spooled.files is not None) for spooled in spool.waiting()]
    (mlflow_store / "artifacts").unlink()
    remaining = Tracker(mlflow_store, "demo").deliver()

    assert (run.status, run.state) == ("FINISHED", "complete")
    assert waiting == [(0, True)]
    assert remaining == 0
    assert len(list((mlflow_store / "artifacts").glob("*/artifacts/videos.mp4"))) == 1


def test_a_log_of_what_is_no_number_waits_and_is_sent(tracker, spool):
    """A video that is all NaN has such scores; MLflow shows them."""
    log = RunLog(number=0, metrics=(LoggedMetric("a", math.nan, 0), LoggedMetric("b", math.inf, 0)))
    spool.add("trial-0", log)

    assert tracker.deliver() == 0
    assert list(spool.damaged()) == list(spool.kept_aside()) == []
    (run,) = tracker.trial_runs()
    assert math.isnan(run.metrics["a"])
    assert run.metrics["b"] > 1e300


def test_logs_for_a_server_never_go_to_the_stores_own_database(
    mlflow_store, spool, tracker, files, make_result, caplog
):
    away = Tracker(mlflow_store, "demo", "http://127.0.0.1:9")
    away.finish_trial(0, "complete", make_result(), files=files)
    tracker.finish_trial(1, "complete", make_result(), files=files)

    assert [(spooled.log.number, spooled.files is not None) for spooled in spool.waiting()] == [(0, True)]
    assert [run.number for run in tracker.trial_runs()] == [1]
    assert "give --tracking-uri" in caplog.text


def test_logs_for_a_server_go_to_it_from_wherever_it_is_given(mlflow_store, spool, make_result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Tracker(mlflow_store, "demo", "http://127.0.0.1:9").finish_trial(0, "complete", make_result())
    there = Tracker(mlflow_store, "demo", f"sqlite:///{tmp_path}/server.db")

    assert there.deliver() == 0
    assert [run.number for run in there.trial_runs()] == [0]
