"""Configs that run out of memory, hang or end their worker: real slots under torchrun, and a model that does so."""

import re
from pathlib import Path

import optuna
import pytest
import yaml

from hyquant.config import QuantConfig, W8A8Dynamic, W8A8Static, digest
from search.errors import SearchError
from search.mlflow_client import prepare_store
from search.poison import poisoned_by
from search.repair import agreement
from search.runner import run_study
from search.storage import open_study
from search.study_file import load_study
from search.trials import count_states, trial_config, trial_reason, trial_result, trial_state
from tests.toys.faulty import FAULTY
from tests.toys.tiny_study import TINY_STUDY

pytestmark = [pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(1200)]

STUDY = {
    **TINY_STUDY,
    "name": "faulty-study",
    "model": FAULTY,
    "space": {
        "name": "two",
        "description": "one dynamic and one static recipe",
        "strategies": ["dynamic", "static"],
        "timestep_sep_share": {"low": 0.0, "high": 0.0, "step": 0.25},
        "act_methods": ["minmax"],
        "include": ["*double_blocks*", "*single_blocks*"],
        "exclusions": {"none": [], "mlp": ["*img_mlp*"]},
        "presets": [],
    },
    "workload": {**TINY_STUDY["workload"], "num_search_prompts": 2},
    "sampler": {"kind": "grid"},
    "budget": {"trials": 4},
}
RENDER_LIMIT_S = 30
TIMEOUTS = {"stages": {"render": RENDER_LIMIT_S}}
"""A hundred times what a rendering takes, so that a busy machine makes none hang but the one that is meant to."""
BACK_S = 180
"""Python, torch and the model are loaded on a busy machine, and nothing is waited for: neither a rendezvous (300 s at
least) nor the watchdog (four hours)."""


@pytest.fixture
def study_with(tmp_path, monkeypatch, faults):
    """Run a study of the failing model; return it and what was told on the way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def run(wanted, **changes) -> tuple[optuna.Study, list[str]]:
        faults.set(*wanted)
        (tmp_path / "calibration.txt").write_text("one red cube\ntwo blue balls\n")
        (tmp_path / "search.txt").write_text("a green cone\na grey ring\n")
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**STUDY, "store": str(tmp_path / "mlruns"), **changes}))
        prepare_store(tmp_path / "mlruns")
        config, events = load_study(path), []
        run_study(config, study_file=path, on_event=events.append)
        study = open_study(Path(config.store), config.name)
        assert count_states(study)["running"] == 0
        assert agreement(Path(config.store), study) == ()
        return study, [event.message for event in events if event.message]

    return run


def evaluated(study: optuna.Study) -> list[QuantConfig]:
    return [trial_config(t) for t in study.trials if trial_state(t) in ("complete", "infeasible", "stopped")]


def test_out_of_memory_on_one_rank_is_an_infeasible_trial_and_the_next_one_runs_in_the_same_process(study_with):
    study, _ = study_with([{"what": "oom", "rank": 1, "times": 1}], slots=[{"ranks": 2}])

    (unfit,) = [trial for trial in study.trials if trial_state(trial) == "infeasible"]
    assert unfit.constraints == {"memory": 1.0}
    assert trial_reason(unfit) == "stage render on rank 1: out of memory: tried to allocate 80.00 GiB"
    assert trial_result(unfit).values is None
    assert count_states(study) == {**count_states(study), "complete": 3, "infeasible": 1, "failed": 0}
    assert len({trial.user_attrs["worker"]["pid"] for trial in study.trials}) == 1
    assert len({digest(config) for config in evaluated(study)}) == 4


def test_a_config_that_ends_its_worker_twice_is_marked_and_the_study_ends_by_itself(study_with):
    """Both static configs kill their worker, four deaths in all, and the slot goes on."""
    study, told = study_with([{"what": "kill", "scheme": "w8a8_static", "times": 100}], budget={"trials": 2})

    assert {type(config.linear) for config in evaluated(study)} == {W8A8Dynamic}
    lost = [trial for trial in study.trials if trial_state(trial) == "failed"]
    by_config: dict[str, list[int]] = {}
    for trial in lost:
        by_config.setdefault(trial.user_attrs["config_digest"], []).append(trial.number)
        assert type(trial_config(trial).linear) is W8A8Static
        assert trial_reason(trial).startswith("its worker died; see ")
    assert by_config
    for key, numbers in by_config.items():
        assert len(numbers) == 2
        assert poisoned_by(study.user_attrs, key) == tuple(numbers)
    assert not [message for message in told if "stopped" in message]


def test_a_rank_that_hangs_is_ended_and_its_trial_tried_again(study_with):
    study, _ = study_with([{"what": "hang", "rank": 1}], slots=[{"ranks": 2}], timeouts=TIMEOUTS)

    (lost,) = [trial for trial in study.trials if trial_state(trial) == "failed"]
    found = re.search(rf"stage render hung for (\d+) s \(limit {RENDER_LIMIT_S} s\)", trial_reason(lost))
    assert found
    assert int(found[1]) >= RENDER_LIMIT_S
    assert lost.user_attrs["config_digest"] in {digest(config) for config in evaluated(study)}
    assert count_states(study)["complete"] == 4
    assert poisoned_by(study.user_attrs, lost.user_attrs["config_digest"]) == ()


def test_a_stopped_rank_is_ended_with_its_group(study_with):
    study, _ = study_with([{"what": "stop", "rank": 1}], slots=[{"ranks": 2}], timeouts=TIMEOUTS)

    (lost,) = [trial for trial in study.trials if trial_state(trial) == "failed"]
    assert "stage render hung" in trial_reason(lost)
    assert count_states(study)["complete"] == 4


def test_a_full_disk_fails_no_config_and_ends_no_worker(study_with):
    """More often than a lost trial is tried again: what a disk refused is no try."""
    study, _ = study_with([{"what": "full", "rank": 1, "times": 2}], slots=[{"ranks": 2}])

    refused = [trial for trial in study.trials if trial_state(trial) == "failed"]
    assert [trial_reason(trial) for trial in refused] == [
        "stage render: [Errno 28] No space left on device: '/a/full/disk'"
    ] * 2
    assert count_states(study)["complete"] == 4
    assert len({trial.user_attrs["worker"]["pid"] for trial in study.trials}) == 1
    assert {trial.user_attrs["config_digest"] for trial in refused} <= {digest(config) for config in evaluated(study)}
    assert study.user_attrs.keys().isdisjoint({f"crash:{trial.number}" for trial in refused})


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"what": "bug", "rank": 1}, "stage render: ZeroDivisionError: a bug of one rank"),
        ({"what": "bug", "rank": 0}, "stage render: ZeroDivisionError: a bug of one rank"),
        ({"what": "denied", "rank": 0}, "stage render: PermissionError: [Errno 13] Permission denied: '/a/folder'"),
    ],
    ids=["another rank", "rank 0", "one that looks like trouble with the store"],
)
def test_a_bug_on_any_rank_fails_its_trial_with_its_traceback_and_the_group_starts_anew(study_with, fault, reason):
    study, told = study_with([fault], slots=[{"ranks": 2}])

    (failed,) = [trial for trial in study.trials if trial_state(trial) == "failed"]
    assert trial_reason(failed) == reason
    assert "in _strike" in failed.user_attrs["log"]
    assert count_states(study) == {**count_states(study), "complete": 3, "waiting": 0}
    assert len({trial.user_attrs["worker"]["pid"] for trial in study.trials}) == 2
    assert study.user_attrs.keys().isdisjoint({f"crash:{failed.number}"})
    assert not [message for message in told if "stopped" in message]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_cannot_do_stops_its_slot_with_one_sentence(study_with, rank):
    sentence = f"study faulty-study stopped early: stage load on rank {rank}: a faulty model must be loaded by another"
    with pytest.raises(SearchError, match=sentence):
        study_with([{"what": "refuse", "rank": rank}], slots=[{"ranks": 2}])


@pytest.mark.parametrize(
    "fault",
    [{"what": "kill"}, {"what": "kill", "after_s": 3}],
    ids=["at work", "while rank 0 waits for it"],
)
def test_a_lost_rank_takes_its_group_along_which_starts_anew_at_once(study_with, fault):
    """Rank 0 may hear of it from the closed connection or from torchrun; the trial is tried again either way."""
    study, _ = study_with([{**fault, "rank": 1}], slots=[{"ranks": 2}])

    (lost,) = [trial for trial in study.trials if trial_state(trial) == "failed"]
    assert count_states(study) == {**count_states(study), "complete": 4, "waiting": 0}
    assert lost.user_attrs["config_digest"] in {digest(config) for config in evaluated(study)}
    assert trial_reason(lost).startswith("its worker died; see ")
    following = min(trial.datetime_start for trial in study.trials if trial.datetime_start > lost.datetime_start)
    assert (following - lost.datetime_complete).total_seconds() < BACK_S
