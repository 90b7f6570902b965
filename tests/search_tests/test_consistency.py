"""Every way in which the parts of a study can contradict each other: found, mended, and found no more."""

import os
import shutil
import time
from datetime import datetime, timedelta

import optuna
import pytest
import torch
from optuna.trial import create_trial

from hyquant.calibration.records import write_records
from hyquant.calibration.store import Store
from hyquant.models import load_model
from hyquant.models.base import RenderSettings
from search.confirmation import Confirmation, store_confirmation
from search.consistency import Place, findings, is_in_progress, mended, stale_trials
from search.findings import mend
from search.joining import _crew
from search.locks import FileLock
from search.processes import WorkerId, this_worker
from search.run_log import RunLog, trial_log
from search.spool import Spool
from search.tracking import Tracker

SETTINGS = RenderSettings(height=16, width=16, num_frames=5, num_steps=2)


@pytest.fixture
def place(mlflow_store, small_study):
    Tracker(mlflow_store, "demo").open_study(small_study)
    return Place(mlflow_store, "demo")


@pytest.fixture
def study(place, make_result):
    """A study of two finished trials, both in MLflow."""
    study = optuna.create_study(study_name="demo", directions=["maximize", "minimize"])
    tracker = Tracker(place.store, "demo")
    for quality in (0.9, 0.8):
        result = make_result(quality=quality)
        number = len(study.trials)
        study.add_trial(create_trial(values=result.values, user_attrs={"result": result.model_dump(mode="json")}))
        tracker.finish_trial(number, "complete", result)
    return study


def make_old(path):
    for part in (path, *path.rglob("*")):
        os.utime(part, (time.time() - 7200,) * 2, follow_symlinks=False)


def snapshot(store):
    kept = (path for path in store.rglob("*") if path.is_file() and not path.name.startswith("mlflow.db"))
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in kept}


def found_mended_and_gone(place, study):
    """Look twice, mend, look again; return the parts and sentences of the first look."""
    before = snapshot(place.store)
    found = findings(place, study, grace_s=0.2)
    assert snapshot(place.store) == before
    _, left = mended(place, study, grace_s=0.2)
    assert left == ()
    assert findings(place, study, grace_s=0.2) == ()
    return [(finding.part, finding.what) for finding in found]


def test_a_study_in_order_has_no_findings(place, study):
    assert findings(place, study, grace_s=0.2) == ()


def test_a_trial_that_nobody_has_is_queued_again(place, study):
    study.ask()
    dead = study.ask()
    dead.set_user_attr("worker", {**this_worker(0).model_dump(), "pid": 2**22 + 1})
    found = found_mended_and_gone(place, study)

    assert [part for part, _ in found] == ["trials", "trials"]
    assert [trial.state.name for trial in study.trials[2:]] == ["FAIL", "FAIL", "WAITING", "WAITING"]


def test_trials_in_somebodys_hands_are_not_stale(study):
    study.ask().set_user_attr("worker", this_worker(0).model_dump())
    far = study.ask()
    elsewhere = WorkerId.model_validate({**this_worker(0).model_dump(), "host": "another-host"})
    far.set_user_attr("worker", elsewhere.model_dump())
    leases = iter(range(1000))
    read = study.get_trials

    def renewing(*args, **kwargs):
        far.set_user_attr("lease", next(leases))
        return read(*args, **kwargs)

    study.get_trials = renewing

    assert stale_trials(study, grace_s=0.5, poll_s=0.05) == {}


def elsewhere(study, lease):
    """Begin a trial of a worker of another host."""
    trial = study.ask()
    worker = WorkerId.model_validate({**this_worker(0).model_dump(), "host": "another-host"})
    trial.set_user_attr("worker", worker.model_dump())
    trial.set_user_attr("lease", lease)
    return trial


def test_time_when_nobody_could_look_is_not_held_against_a_trial(study):
    """The database is away for five minutes at the second look, and one of two workers renews its lease after that."""
    trials = [elsewhere(study, 7), elsewhere(study, 7)]
    now, num_looks, read = 0.0, 0, study.get_trials

    def away(*args, **kwargs):
        nonlocal now, num_looks
        num_looks += 1
        now += 300.0 if num_looks == 2 else 1.0
        if num_looks > 5:
            trials[0].set_user_attr("lease", 7 + num_looks)
        return read(*args, **kwargs)

    study.get_trials = away

    assert stale_trials(study, grace_s=60.0, poll_s=0.0, clock=lambda: now) == {trials[1].number: 7}
    assert num_looks > 50


def test_a_trial_whose_lease_was_renewed_since_the_look_is_left_to_its_worker(place, study):
    renewed, still = elsewhere(study, 7), elsewhere(study, 7)
    found = findings(place, study, grace_s=0.1)
    renewed.set_user_attr("lease", 8)
    mend(found)

    assert [finding.part for finding in found] == ["trials", "trials"]
    assert [trial.state.name for trial in study.trials[renewed.number :]] == ["RUNNING", "FAIL", "WAITING"]
    assert still.number == renewed.number + 1


@pytest.mark.parametrize("host", ["node", "node.example.org"])
def test_a_study_is_not_in_progress_while_one_is_whose_name_begins_with_its_own(tmp_path, monkeypatch, host):
    monkeypatch.setattr("socket.gethostname", lambda: host)

    def which():
        return [name for name in ("mini", "mini.v2", "mini-2") if is_in_progress(tmp_path, name)]

    found = []
    for name in ("mini.v2", "mini"):
        lock = FileLock(tmp_path / "locks" / f"{name}.runner.lock")
        lock.acquire()
        found.append(which())
        lock.release()
        with _crew(tmp_path, name):
            found.append(which())

    assert found == [["mini.v2"], ["mini.v2"], ["mini"], ["mini"]]
    assert which() == []


def test_runs_that_differ_are_corrected(place, study):
    tracker = Tracker(place.store, "demo")
    tracker.start_trial(0)  # a second run
    tracker.finish_trial(99, "complete", None)  # a run without a trial
    tracker.delete_run(next(run.run_id for run in tracker.trial_runs() if run.number == 1))  # a trial without a run
    found = found_mended_and_gone(place, study)

    assert [what for _, what in found] == [
        "trial 0 has 2 MLflow runs instead of one",
        "trial 1 has no MLflow run",
        "trial 99 is in MLflow but not in Optuna",
    ]


def test_a_study_that_mlflow_does_not_know_is_made(mlflow_store, stored_store):
    from search.storage import open_study

    study = open_study(stored_store, "demo")
    place = Place(mlflow_store, "demo")
    mend(findings(place, study, grace_s=0.1))

    assert findings(place, study, grace_s=0.1) == ()
    assert len(Tracker.of(mlflow_store, study).trial_runs()) == 16


def test_spooled_logs_are_sent_with_their_files(place, study, make_result, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "videos.mp4").write_bytes(b"a video")
    result = make_result()
    study.add_trial(create_trial(values=result.values, user_attrs={"result": result.model_dump(mode="json")}))
    spool = Spool(place.store, "demo")
    spool.add("trial-2", trial_log(2, "complete", result), tmp_path / "files")
    spool.add("trial-0", RunLog(number=0), tmp_path / "files")
    damaged = sorted(spool.folder.glob("*-trial-0"))[0]
    (damaged / "log.json").write_bytes(b"")
    found = findings(place, study, grace_s=0.2)
    mended(place, study, grace_s=0.2)

    assert [finding.part for finding in found] == ["spool", "spool"]
    assert findings(place, study, grace_s=0.2) == ()
    assert len(list(place.store.glob("artifacts/*/artifacts/videos.mp4"))) == 2


def test_while_a_run_is_in_progress_what_is_in_flight_is_no_finding(place, study, make_result):
    result = make_result()
    for _ in range(2):
        trial = study.ask()
        trial.set_user_attr("worker", this_worker(0).model_dump())
        trial.set_user_attr("result", result.model_dump(mode="json"))
        study.tell(trial, result.values)
    Tracker(place.store, "demo").start_trial(2)
    Spool(place.store, "demo").add("trial-3", trial_log(3, "complete", result))
    lock = FileLock(place.store / "locks" / "demo.runner.lock")
    lock.acquire()
    during = findings(place, study, grace_s=0.2)
    lock.release()
    after = [finding.part for finding in findings(place, study, grace_s=0.2)]

    assert during == ()
    assert after == ["spool", "MLflow and Optuna"]


def test_damaged_and_unknown_cache_entries_go(place, study):
    cache = Store(place.store / "cache")
    for key in ("good", "flipped", "short"):
        cache.put(key, {"x": torch.arange(4.0)}, {"key": key})
    flipped, short = cache.root / "flipped.safetensors", cache.root / "short.json"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"?")
    short.write_bytes(short.read_bytes()[:9])
    (cache.root / "half.safetensors").write_bytes(b"tensors come first, JSON last")
    (cache.root / "notes.txt").write_text("mine")
    model = load_model("tiny", "0", device="cpu")
    for key in ("records", "torn"):
        write_records(cache.root / key, lambda put: model.capture(["a circle"], [0], SETTINGS, put))
    next((cache.root / "torn").glob("*.safetensors")).unlink()
    fresh = findings(place, study, grace_s=0.2)
    make_old(cache.root)
    found = found_mended_and_gone(place, study)

    assert fresh == ()  # it may be in the making
    assert [what.partition("cache/")[2].split()[0] for _, what in found] == [
        "flipped.json",
        "half.safetensors",
        "notes.txt",
        "short.json",
        "torn",
    ]
    assert {path.name for path in cache.root.iterdir()} == {"good.json", "good.safetensors", "records"}
    assert [path.read_text() for path in (place.store / "unknown").iterdir()] == ["mine"]


def test_an_entry_that_was_built_again_since_the_look_stays(place, study):
    cache = Store(place.store / "cache")
    cache.put("key", {"x": torch.arange(4.0)}, {})
    (cache.root / "key.json").write_bytes(b"{")
    make_old(cache.root)
    found = findings(place, study, grace_s=0.2)
    cache.put("key", {"x": torch.arange(4.0)}, {})
    mend(found)

    assert [finding.part for finding in found] == ["cache"]
    assert cache.has("key")


def test_an_entry_that_the_disk_does_not_give_is_named_and_left(place, study):
    """Reading a process's memory at 0 is an input/output error, also for root."""
    link = place.store / "cache" / "key.json"
    link.parent.mkdir()
    link.symlink_to("/proc/self/mem")
    os.utime(link, (1000, 1000), follow_symlinks=False)
    found, left = mended(place, study, grace_s=0.2)

    assert found == left
    assert [(finding.what, finding.mend) for finding in left] == [(f"{link} cannot be read: Input/output error", None)]


def test_a_file_whose_name_is_no_key_is_no_entry(place, study):
    notes = place.store / "cache" / "my notes.json"
    notes.parent.mkdir()
    notes.write_text("{}")
    make_old(notes)

    assert found_mended_and_gone(place, study) == [("cache", f"{notes} is no entry of a cache")]
    assert [path.read_text() for path in (place.store / "unknown").iterdir()] == ["{}"]


def test_what_killed_writers_left_goes_and_what_is_being_written_stays(place, study):
    left = [
        place.store / ".again-x",
        place.store / "cache" / ".key.abc",
        place.store / "logs" / "demo" / "slot0" / ".a.b",
    ]
    for folder in left:
        (folder / "new").mkdir(parents=True)
        (folder / "new" / "part").write_text("half")
        make_old(folder)
    busy = place.store / "cache" / ".key.busy"
    busy.mkdir()
    found = found_mended_and_gone(place, study)

    assert [part for part, _ in found] == ["leftovers"] * 3
    assert busy.is_dir()


def test_notes_about_hung_trials_go_when_the_trial_has_ended(place, study):
    study.ask().set_user_attr("worker", this_worker(0).model_dump())
    folder = place.store / "logs" / "demo" / "slot0"
    folder.mkdir(parents=True)
    for number in (1, 2):
        (folder / f"hung-{number}.txt").write_text("stage render hung for 300 s")
    make_old(folder)
    found = found_mended_and_gone(place, study)

    assert found == [("notes", "trial 1 ended its worker: stage render hung for 300 s")]
    assert (folder / "hung-2.txt").exists()


def test_no_video_goes_with_the_database_of_mlflow(
    place, study, small_study, make_result, files, mlflow_template, tmp_path, monkeypatch
):
    """The call that makes the database leaves them where they are, the next one moves them aside."""
    Tracker(place.store, "demo").finish_trial(0, "complete", make_result(quality=0.9), files=files)
    study.set_user_attr("study_config", small_study.model_dump(mode="json"))
    lost = Place(tmp_path / "lost", "demo")
    shutil.copytree(place.store, lost.store, ignore=shutil.ignore_patterns("mlflow.db*"))
    make_old(lost.store / "artifacts")
    (video,) = lost.store.glob("artifacts/*/artifacts/videos.mp4")

    def prepare(store):  # in place of seconds of migrations
        for part in mlflow_template.glob("mlflow.db*"):
            shutil.copy(part, store / part.name)

    monkeypatch.setattr("search.consistency.prepare_store", prepare)
    _, left = mended(lost, study, grace_s=0.1)
    after_the_first = video.read_bytes()
    _, left_again = mended(lost, study, grace_s=0.1)

    assert {finding.part for finding in left} == {"artifacts"}
    assert all("put a copy of the old one back" in finding.way_out for finding in left)
    assert after_the_first == b"a video"
    assert left_again == ()
    assert not video.exists()
    (moved,) = (lost.store / "unknown").rglob("videos.mp4")
    assert moved.read_bytes() == b"a video"
    assert moved.parents[1].name.endswith(f"-{video.parents[1].name}")


def test_artifacts_of_unknown_runs_are_moved_aside_and_nothing_outside_of_the_store_is_touched(place, study, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    artifacts = place.store / "artifacts"
    orphan, link = artifacts / ("0" * 32), artifacts / ("1" * 32)
    orphan.mkdir()
    link.symlink_to(outside)
    (orphan / "inner").symlink_to(outside)
    for path in (orphan, link):
        os.utime(path, (time.time() - 7200,) * 2, follow_symlinks=False)
    found = findings(place, study, grace_s=0.2)
    mend(found)

    assert [finding.what for finding in found] == [f"{orphan} belongs to no MLflow run"]
    assert not orphan.exists()
    assert [path.name.rpartition("-")[2] for path in (place.store / "unknown").iterdir()] == [orphan.name]
    assert (outside / "precious").read_text() == "mine"
    assert len(list(artifacts.iterdir())) >= 1


def test_what_mlflow_refuses_is_left_with_its_reason(place, study, make_result):
    result = make_result()
    for _ in range(2):
        study.add_trial(create_trial(values=result.values, user_attrs={"result": result.model_dump(mode="json")}))
    Tracker(place.store, "demo").send(RunLog(number=2, params={"strategy": "another"}))
    _, left = mended(place, study, grace_s=0.2)

    assert [finding.what.split()[1] for finding in left] == ["2"]
    assert "not mended: trial 2" in left[0].way_out
    assert "strategy" in left[0].way_out


def test_logs_for_a_server_wait_for_its_address_and_no_database_is_made(stored_store, make_result, files, tmp_path):
    from search.storage import open_study

    study, place = open_study(stored_store, "demo"), Place(stored_store, "demo")
    away = Tracker.of(stored_store, study, "http://127.0.0.1:9")
    for number in range(3):
        away.finish_trial(number, "complete", make_result(), files=files)
    spool = Spool(stored_store, "demo")
    spool.add("trial-3", RunLog(number=3), files)
    (damaged,) = spool.folder.glob("*-trial-3")
    (damaged / "log.json").write_bytes(b"")
    before = snapshot(spool.folder)
    _, left = mended(place, study, grace_s=0.2)

    assert {path.relative_to(spool.folder).parts[-1] for path in before} == {"log.json", "videos.mp4"}
    assert {data for _, data in before.items()} <= {data for _, data in snapshot(spool.folder).items()}
    assert not (stored_store / "mlflow.db").exists()
    assert [finding.part for finding in left] == ["spool"] * 3 + ["MLflow and Optuna", "spool"]
    assert all("--tracking-uri" in finding.way_out and finding.mend is None for finding in left)


def test_what_a_log_that_was_set_aside_was_about_is_sent_again(place, study, small_study, make_result, tmp_path):
    """The report of a study, its end, what was measured again, and videos; Optuna has all but the files."""
    study.set_user_attr("study_config", small_study.model_dump(mode="json"))
    again = make_result(quality=0.7)
    store_confirmation(study, 0, Confirmation(result=again))
    spool = Spool(place.store, "demo")
    for label, name in (("report", "front.html"), ("again-0", None), ("trial-1", "videos.mp4"), ("open", "study.yaml")):
        folder = tmp_path / label
        folder.mkdir()
        if name is not None:
            (folder / name).write_text(label)
        spool.add(label, RunLog(number=None), folder if name else None)
    for folder in spool.folder.glob("[0-9]*"):
        (folder / "log.json").write_bytes(b"")
    found, left = mended(place, study, grace_s=0.2)
    client = Tracker(place.store, "demo")._client
    (experiment,) = client.search_experiments(filter_string="name = 'demo'")
    runs = {run.data.tags.get("hyq.trial"): run for run in client.search_runs([experiment.experiment_id])}
    files = {
        number: sorted(file.path for file in client.list_artifacts(run.info.run_id)) for number, run in runs.items()
    }

    assert len(found) == 8  # damaged, then set aside
    assert left == ()
    assert not list(spool.aside.iterdir())
    assert files == {None: ["front.html", "study.yaml"], "0": [], "1": ["videos.mp4"]}
    assert runs[None].info.status == "KILLED"  # its budget is not used
    assert runs["0"].data.metrics["again.clip_reference_mean"] == again.metrics["clip_reference"].mean


def test_a_log_of_what_optuna_does_not_know_is_kept(place, study, files):
    spool = Spool(place.store, "demo")
    for label in ("trial-99", "again-0"):
        spool.add(label, RunLog(number=99), files)
    for folder in spool.folder.glob("[0-9]*"):
        spool.set_aside(folder, "it was refused")
    _, left = mended(place, study, grace_s=0.2)

    assert sorted(finding.way_out.partition("does not know ")[2].split(";")[0] for finding in left) == [
        "again-0",
        "trial-99",
    ]
    assert len(list(spool.aside.glob("*/files/videos.mp4"))) == 2


@pytest.mark.parametrize("ahead_h", [-8, 8])
def test_what_is_in_flight_is_judged_by_the_clock_of_its_host(place, study, make_result, ahead_h):
    """While a study is in progress: a trial that its host went on from is missed in MLflow, its last one is not."""
    elsewhere = WorkerId.model_validate({**this_worker(0).model_dump(), "host": "another-host"})
    result = make_result()
    first = datetime.now() + timedelta(hours=ahead_h)
    for minutes in (0, 11):
        attrs = {"result": result.model_dump(mode="json"), "worker": elsewhere.model_dump()}
        trial = create_trial(values=result.values, user_attrs=attrs)
        trial.datetime_start = trial.datetime_complete = first + timedelta(minutes=minutes)
        study.add_trial(trial)
    lock = FileLock(place.store / "locks" / "demo.runner.lock")
    lock.acquire()
    found = findings(place, study, grace_s=0.2)
    lock.release()

    assert [finding.what for finding in found] == ["trial 2 has no MLflow run"]
