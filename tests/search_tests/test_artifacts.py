"""What a study's policy lets go: checked on the files of a store, with links that lead out of it."""

import json
import os
import shutil
import time

import optuna
import pytest
import torch

from hyquant.calibration.store import Store
from search.artifacts import apply, apply_policy, kept_trials, removals
from search.cli import exit_code_of
from search.errors import SearchError, StoreError
from search.leftovers import cache_findings
from search.locks import FileLock
from search.removal import is_inside, remove
from search.storage import open_study, store_config
from search.study import ArtifactsConfig
from search.tracking import Tracker
from search.trials import front


@pytest.fixture
def store(stored_store, mlflow_template, small_study, make_result, tmp_path):
    """A store with the study of `filled_study`, whose first six trials have videos of 1000 bytes in MLflow."""
    for part in mlflow_template.glob("mlflow.db*"):
        shutil.copy(part, stored_store / part.name)
    tracker = Tracker.of(stored_store, open_study(stored_store, "demo"))
    tracker.open_study(small_study)
    files = tmp_path / "files"
    files.mkdir()
    for name in ("videos.mp4", "strip.png", "result.json"):
        (files / name).write_bytes(b"x" * 1000)
    for number in range(6):
        tracker.finish_trial(number, "complete", make_result(), files=files)
    return stored_store


@pytest.fixture
def study(store):
    return open_study(store, "demo")


def runs_of(store):
    return Tracker.of(store, open_study(store, "demo")).trial_runs()


def files_of(store):
    runs = {run.run_id: run.number for run in runs_of(store)}
    found = {}
    for run_id, number in runs.items():
        found[number] = sorted(path.name for path in (store / "artifacts" / run_id / "artifacts").iterdir())
    return found


def age(path, hours):
    for part in (path, *path.rglob("*")):
        os.utime(part, (time.time() - 3600 * hours,) * 2)


def test_by_default_everything_stays(store, study):
    assert removals(store, study, ArtifactsConfig(), is_server=False) == ()


@pytest.mark.parametrize("policy", [ArtifactsConfig(keep="front"), ArtifactsConfig(keep="last", last=9)])
def test_media_of_trials_outside_the_policy_go_and_their_numbers_stay(store, study, policy):
    kept = kept_trials(study, policy)
    before = {run.number: run.metrics for run in runs_of(store)}
    apply_policy(store, study, policy, is_server=False, at_end=False)
    after = {run.number: run.metrics for run in runs_of(store)}

    assert {trial.number for trial in front(study)} <= kept
    assert set(range(6)) - kept
    assert set(range(6)) & kept
    for number, names in files_of(store).items():
        assert names == (["result.json", "strip.png", "videos.mp4"] if number in kept else ["result.json"])
    assert before == after
    assert removals(store, study, policy, is_server=False) == ()


def test_only_runs_that_still_have_media_are_read(store, study, monkeypatch):
    from mlflow import MlflowClient

    policy, read = ArtifactsConfig(keep="front"), []
    search_runs = MlflowClient.search_runs

    def counted(*args, **options):
        page = search_runs(*args, **options)
        read.extend(run.info.run_id for run in page)
        return page

    (store / "artifacts" / "no 'id'" / "artifacts").mkdir(parents=True)
    (store / "artifacts" / "no 'id'" / "artifacts" / "strip.png").touch()
    apply_policy(store, study, policy, is_server=False, at_end=False)
    monkeypatch.setattr(MlflowClient, "search_runs", counted)
    left = removals(store, study, policy, is_server=False)
    numbers = {run.run_id: run.number for run in runs_of(store)}
    asked = read[: -len(numbers)]

    assert left == ()
    assert {numbers[run_id] for run_id in asked} == kept_trials(study, policy) & set(range(6))


def test_a_run_whose_files_went_says_so(store, study):
    from mlflow import MlflowClient

    chosen = removals(store, study, ArtifactsConfig(keep="front"), is_server=False)
    freed = apply(store, "demo", chosen)
    run = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db").get_run(chosen[0].run_id)

    assert freed == 2000 * len(chosen)
    assert run.data.tags["hyq.files_removed"].endswith("is outside of keep: front")


def test_files_go_only_once_their_run_says_so(store, study, monkeypatch, caplog):
    def away(*_):
        raise StoreError("MLflow is away")

    before = files_of(store)
    chosen = removals(store, study, ArtifactsConfig(keep="front"), is_server=False)
    monkeypatch.setattr(Tracker, "tag", away)

    assert apply(store, "demo", chosen) == 0
    assert chosen
    assert files_of(store) == before
    assert "MLflow is away" in caplog.text


def test_of_the_cache_the_least_recently_used_goes_until_the_quota_is_kept(store, study):
    cache = Store(store / "cache")
    for hours, key in ((2, "recent"), (9, "oldest"), (5, "middle"), (0, "now")):
        cache.put(key, {"x": torch.zeros(250_000)}, {})
        for path in cache.root.glob(f"{key}.*"):
            age(path, hours)
    over = removals(store, study, ArtifactsConfig(quota_gb=2.5e-3), is_server=False)
    far_over = removals(store, study, ArtifactsConfig(quota_gb=1e-6), is_server=False)
    apply(store, "demo", over)

    assert [one.paths[0].stem for one in over] == ["oldest", "middle"]
    assert [one.paths[0].stem for one in far_over] == ["oldest", "middle", "recent"]
    assert [cache.has(key) for key in ("recent", "oldest", "middle", "now")] == [True, False, False, True]


@pytest.fixture
def old_entry(tmp_path):
    """A store's cache with an entry of some kilobytes that was written nine hours ago."""
    cache = Store(tmp_path / "store" / "cache")
    cache.put("old", {"x": torch.zeros(1000)}, {})
    age(cache.root, 9)
    return cache


TIGHT = ArtifactsConfig(quota_gb=1e-6)


def over_the_quota(cache, *, is_runner=False):
    """Return what study demo lets go of a store whose cache this is."""
    study = optuna.create_study(study_name="demo")
    return removals(cache.root.parent, study, TIGHT, is_server=False, is_runner=is_runner)


@pytest.mark.parametrize("name", ["other.runner.lock", "demo.runner.lock", "demo.host-0a1b2c-0.lock"])
def test_nothing_of_the_cache_goes_while_any_study_of_the_store_is_in_progress(old_entry, name):
    with FileLock(old_entry.root.parent / "locks" / name).held():
        during = over_the_quota(old_entry)

    assert during == ()
    assert len(over_the_quota(old_entry)) == 1


def test_a_runner_keeps_the_quota_of_its_own_study_at_its_end_though_it_still_holds_it(old_entry):
    store = old_entry.root.parent
    with FileLock(store / "locks" / "demo.runner.lock").held():
        apply_policy(store, optuna.create_study(study_name="demo"), TIGHT, is_server=False, at_end=True)

    assert not old_entry.has("old")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("exporting", ["export", "demo", "--pick", "safe"]),
        ("calibrating", ["calibrate", "demo", "config.yaml"]),
    ],
)
def test_nothing_of_the_cache_goes_while_a_command_calibrates_from_it(
    stored_store, old_entry, module, arguments, tmp_path, monkeypatch
):
    seen = []

    def look(*_):
        seen.append(over_the_quota(old_entry, is_runner=True))
        raise SearchError("it has been seen")

    monkeypatch.setattr(f"search.{module}.calibrate_for", look)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("linear: {kind: w8a8_static}")

    assert exit_code_of([*arguments, "--out", str(tmp_path / "out"), "--store", str(stored_store)]) == 1
    assert seen == [()]
    assert len(over_the_quota(old_entry)) == 1


def test_what_is_used_after_it_was_chosen_stays(old_entry):
    chosen = over_the_quota(old_entry)
    old_entry.get("old")

    assert len(chosen) == 1
    assert apply(old_entry.root.parent, "demo", chosen) == 0
    assert old_entry.has("old")
    assert over_the_quota(old_entry) == ()


def test_a_look_at_the_whole_cache_is_no_use_of_it(old_entry):
    assert list(cache_findings(old_entry.root.parent)) == []
    assert len(over_the_quota(old_entry)) == 1


def test_what_stays_above_the_quota_is_said_by_gc_and_at_the_end_of_a_run(store, study, small_study, capsys, caplog):
    """The artifacts of six trials, of which nothing may go, against a quota just below and just above."""
    held = sum(path.stat().st_size for path in (store / "artifacts").rglob("*") if path.is_file())
    for quota_bytes, is_above in ((held - 1000, True), (held + 1000, False)):
        policy = ArtifactsConfig(quota_gb=quota_bytes / 1e9)
        store_config(study, small_study.model_copy(update={"artifacts": policy}))
        caplog.clear()
        apply_policy(store, study, policy, is_server=False, at_end=False)
        before_the_end = caplog.text
        apply_policy(store, study, policy, is_server=False, at_end=True)
        assert exit_code_of(["gc", "demo", "--store", str(store)]) == 0
        sentence = f"but {held / 1e9:.4g} GB stay: artifacts within keep: all"

        assert before_the_end == ""
        assert (sentence in caplog.text) == (sentence in capsys.readouterr().err) == is_above


def test_what_links_lead_to_is_never_touched(store, study, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "videos.mp4").write_bytes(b"precious")
    for run in runs_of(store):
        folder = store / "artifacts" / run.run_id / "artifacts"
        folder.rename(folder.with_name("moved"))
        folder.symlink_to(outside)
    (store / "cache").mkdir()
    (store / "cache" / "key.safetensors").symlink_to(outside / "videos.mp4")
    policy = ArtifactsConfig(keep="front", quota_gb=1e-6)

    assert removals(store, study, policy, is_server=False) == ()
    assert not remove(store / "cache" / "key.safetensors", store)
    assert not remove(store / ".." / "outside", store)
    assert not is_inside(outside, store)
    assert (outside / "videos.mp4").read_bytes() == b"precious"


def test_gc_lists_and_removes_with_yes_only(store, study, small_study, capsys):
    store_config(study, small_study.model_copy(update={"artifacts": ArtifactsConfig(keep="front")}))
    gc = ["gc", "demo", "--store", str(store), "--json"]
    answers = []
    for options in ([], [], ["--yes"], []):
        assert exit_code_of([*gc, *options]) == 0
        answers.append(json.loads(capsys.readouterr().out))

    assert answers[0] == answers[1]
    assert answers[0]["freed_bytes"] == 0
    assert answers[2]["removals"] == answers[0]["removals"]
    assert answers[2]["freed_bytes"] == 2000 * len(answers[0]["removals"]) > 0
    assert answers[3]["removals"] == []
