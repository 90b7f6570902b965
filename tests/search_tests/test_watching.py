"""What a runner does about the workers of its slots, whoever else looks at their leases."""

import os
import signal
import subprocess
import sys
import time
from itertools import count

import optuna
import pytest
from optuna.trial import TrialState

from search.confirmation import confirmations
from search.interrupts import Interrupts
from search.lease import GRACE_S, LEASE, LeaseWatch
from search.order import SlotState, is_asked_to_leave, write_state
from search.processes import ProcessId, WorkerId, is_alive, process_id, this_process, this_worker
from search.resume import reclaim_lost_trials
from search.retry import queued_again
from search.sharing import MemberClaims, member_claims
from search.slots import RunningSlot, SlotSigns
from search.storage import open_study
from search.watching import Watcher, _look_after_claims, _take_back, leave_at_once, watch
from tests.toys.statements import statements, texts


@pytest.fixture
def study():
    return optuna.create_study(directions=["maximize", "minimize"])


@pytest.fixture
def child():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def identity(process: subprocess.Popen[bytes], *, slot: int = 0, runner: ProcessId | None = None) -> WorkerId:
    own = this_worker(slot, runner=runner or this_process())
    return own.model_copy(update=process_id(process.pid).model_dump())


def trial_of(study: optuna.Study, worker: WorkerId) -> optuna.Trial:
    trial = study.ask()
    trial.set_user_attr("worker", worker.model_dump())
    trial.set_user_attr("config_digest", "a config")
    trial.set_user_attr(LEASE, 3)
    return trial


class Looks:
    """A runner of one slot and another observer, who look once a second of a clock that is moved by hand."""

    def __init__(self, study: optuna.Study, child: subprocess.Popen[bytes], folder) -> None:
        self.study, self.now_s = study, 0.0
        self.slots = [RunningSlot(index=0, agent=child, folder=folder)]
        self.here, self.there = (LeaseWatch(clock=lambda: self.now_s) for _ in range(2))

    def look(self, *, here: bool = True, there: bool = True) -> None:
        self.now_s += 1.0
        if there:
            reclaim_lost_trials(self.study, self.there)
        if here:
            _take_back(self.study, self.study.get_trials(deepcopy=False), self.slots, self.here)


def crashes(study: optuna.Study) -> list[str]:
    return [key for key in study.user_attrs if key.startswith("crash:")]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_worker_that_stands_still_is_ended_by_its_runner_whoever_takes_its_trial_first(
    study, child, tmp_path, is_first
):
    child.send_signal(signal.SIGSTOP)
    worker = identity(child)
    trial_of(study, worker)
    looks = Looks(study, child, tmp_path)

    for _ in range(int(GRACE_S) + 2):
        looks.look(there=not is_first)

    assert child.wait(timeout=10) == -signal.SIGKILL
    assert not is_alive(worker)
    assert crashes(study) == ["crash:0"]


@pytest.mark.parametrize("is_own", [True, False])
def test_a_worker_that_stands_still_while_it_measures_a_member_again_is_ended_by_its_runner(study, child, is_own):
    """It has no trial in hand whose lease would tell."""
    another = this_process().model_copy(update={"started": "1"})
    clock = count()
    leases = LeaseWatch(clock=lambda: next(clock))
    assert MemberClaims(study, identity(child, runner=None if is_own else another)).claim([3]) == 3

    for _ in range(int(GRACE_S)):
        _look_after_claims(study, study.user_attrs, leases)
    assert child.poll() is None
    _look_after_claims(study, study.user_attrs, leases)

    assert (child.wait(timeout=10) if is_own else child.poll()) == (-signal.SIGKILL if is_own else None)


def test_a_worker_that_renews_its_claim_is_left_alone(study, child):
    clock = count(step=6)
    leases = LeaseWatch(clock=lambda: next(clock))
    claims = MemberClaims(study, identity(child))
    assert claims.claim([3]) == 3

    for lease in range(int(GRACE_S)):
        claims._write(3, lease)
        _look_after_claims(study, study.user_attrs, leases)
    claims._write(3, None)
    for _ in range(int(GRACE_S)):
        _look_after_claims(study, study.user_attrs, leases)

    assert child.poll() is None


@pytest.mark.parametrize("is_own", [True, False])
def test_a_member_that_ends_two_workers_that_measure_it_again_is_not_offered(study, is_own):
    runner = this_process() if is_own else process_id(os.getppid())
    dead = this_worker(0, runner=runner).model_copy(update={"started": "1"})
    for pid in (1, 2):
        assert 3 not in confirmations(study)
        assert MemberClaims(study, dead.model_copy(update={"pid": pid})).claim([3]) == (
            3 if is_own or pid == 1 else None
        )
        _look_after_claims(study, study.user_attrs, LeaseWatch())
        _look_after_claims(study, study.user_attrs, LeaseWatch())

    assert list(confirmations(study)) == ([3] if is_own else [])
    assert len(member_claims(study.user_attrs)) == (0 if is_own else 1)
    if is_own:
        assert confirmations(study)[3].reason == "measured again with fresh seeds: its worker ended 2 times"


def test_looking_whether_a_worker_lives_interns_no_string(child, monkeypatch):
    """By each that is forgotten the interpreter's table of them comes nearer to its next size."""
    interned = []
    monkeypatch.setattr(sys, "intern", lambda text: interned.append(text) or text)

    assert is_alive(identity(child))
    assert str(child.pid) not in interned


def test_what_a_killed_run_measured_again_is_free_for_the_next_one_at_once_and_nobody_is_to_blame(study):
    gone = this_process().model_copy(update={"started": "1"})
    for pid in (1, 2):
        dead = this_worker(0, runner=gone).model_copy(update={"pid": pid, "started": "1"})
        assert MemberClaims(study, dead).claim([3]) == 3
        _look_after_claims(study, study.user_attrs, LeaseWatch())

    assert member_claims(study.user_attrs) == {}
    assert confirmations(study) == {}


def test_an_interrupted_slot_hands_back_what_it_begins_while_it_is_stopped_too(study, tmp_path, monkeypatch):
    slot = RunningSlot(index=0, agent=None, folder=tmp_path)
    crew = this_worker(0, crew="here-0").model_dump()
    study.ask().set_user_attr("worker", crew)

    def stop_slots(slots, *, is_impatient):
        assert is_asked_to_leave(slots[0].folder)
        study.ask().set_user_attr("worker", crew)  # it was just about to
        assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.RUNNING]

    monkeypatch.setattr("search.watching.stop_slots", stop_slots)

    assert leave_at_once(study, [slot], "here-0", Interrupts()) == [0, 1]

    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.FAIL, TrialState.WAITING]
    assert queued_again(study.trials) == {0, 1}
    assert "retry_history" not in study.trials[2].system_attrs


def test_a_worker_that_was_cut_off_together_with_its_runner_lives_and_is_not_blamed(study, child, tmp_path):
    trial_of(study, identity(child))
    looks = Looks(study, child, tmp_path)
    looks.look()

    for _ in range(int(GRACE_S)):
        looks.look(here=False)
    looks.look()
    looks.look()

    assert study.trials[0].state.is_finished()
    assert child.poll() is None
    assert crashes(study) == []


def test_a_worker_that_has_begun_another_trial_does_not_stand_still(study, child, tmp_path):
    worker = identity(child)
    trial_of(study, worker)
    looks = Looks(study, child, tmp_path)
    for _ in range(int(GRACE_S) - 1):
        looks.look()
    study.tell(0, state=optuna.trial.TrialState.FAIL)
    trial_of(study, worker)

    looks.look()

    assert child.poll() is None
    assert crashes(study) == []


def test_what_a_runner_that_was_killed_left_is_taken_back_by_the_next_and_blames_no_config(study, child, tmp_path):
    """A worker that is preempted as a whole and started again, here with fewer slots, was not ended by its config."""
    before = this_process().model_copy(update={"started": "1"})
    workers = [identity(child, slot=slot, runner=before) for slot in (0, 0, 3)]
    child.kill()
    child.wait()

    for worker in workers:
        trial_of(study, worker)
        looks = Looks(study, child, tmp_path)
        looks.look(there=False)

    assert [trial.state.name for trial in study.trials if trial.user_attrs.get("worker")] == ["FAIL"] * 3
    assert crashes(study) == []


class SlotOfAStory:
    """A slot whose signs change at given times of a clock that only the watcher's rests move."""

    index = 0

    def __init__(self, story: dict[float, SlotSigns]) -> None:
        self.story, self.now_s = story, 0.0

    def signs(self) -> SlotSigns:
        return self.story[max(at_s for at_s in self.story if at_s <= self.now_s)]

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


def test_the_study_is_read_every_five_seconds_and_at_once_when_a_slot_here_has_something_to_tell(
    study, small_study, monkeypatch
):
    first, second = (ProcessId(pid=pid, started="1") for pid in (1, 2))
    slot = SlotOfAStory(
        {
            0.0: SlotSigns(is_running=True, worker=None, told_ns=0),
            2.0: SlotSigns(is_running=True, worker=first, told_ns=0),
            13.5: SlotSigns(is_running=True, worker=first, told_ns=1),  # a trial has finished
            21.0: SlotSigns(is_running=True, worker=None, told_ns=1),  # rank 0 died
            21.5: SlotSigns(is_running=True, worker=second, told_ns=1),
            30.0: SlotSigns(is_running=False, worker=None, told_ns=1),
        }
    )
    looks: list[float] = []
    monkeypatch.setattr(Watcher, "look", lambda self: looks.append(slot.now_s))

    watch(study, small_study, [slot], slot, lambda event: None, clock=lambda: slot.now_s)

    assert looks == [0.0, 2.0, 7.0, 12.0, 13.5, 18.5, 21.0, 21.5, 26.5, 30.0]


@pytest.mark.multiproc
def test_a_slot_tells_within_a_poll_that_its_rank_0_began_wrote_its_state_and_died(child, tmp_path):
    slot = RunningSlot(index=0, agent=child, folder=tmp_path)
    assert slot.signs() == SlotSigns(is_running=True, worker=None, told_ns=0)

    code = "import sys, pathlib, search.order as order; order.write_worker(pathlib.Path(sys.argv[1])); input()"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE) as rank:
        while slot.signs().worker is None and rank.poll() is None:
            time.sleep(0.05)
        began = slot.signs()
        assert began.worker == process_id(rank.pid)
        write_state(tmp_path, SlotState())
        assert slot.signs().told_ns > began.told_ns
        rank.kill()
        rank.wait()
    assert slot.signs().worker is None
    child.kill()
    child.wait()
    assert not slot.signs().is_running


@pytest.mark.parametrize("url", [None, "postgresql://db/hyq"], ids=["in the store", "on a server"])
def test_nobody_is_held_for_still_whose_lease_a_full_disk_does_not_take(
    stored_store, small_study, child, monkeypatch, url
):
    """SQLite answers all that is asked on a full disk; for longer than a lease lives, nobody can write."""
    study, clock = open_study(stored_store, "demo"), count(step=5)
    trial = trial_of(study, identity(child))
    config = small_study.model_copy(update={"store": str(stored_store), "storage": url})
    told = []
    watcher = Watcher(study, config, [RunningSlot(index=0, agent=child, folder=stored_store)], told.append)
    watcher._leases = LeaseWatch(clock=lambda: next(clock))
    monkeypatch.setattr("search.watching.fullness", lambda store: "it is full")
    monkeypatch.setattr("search.room.fullness", lambda store: "it is full")
    for _ in range(40):
        watcher.look()
    monkeypatch.undo()
    for lease in (3, 3, 4, 5):
        if study.trials[trial.number].state == TrialState.RUNNING:
            trial.set_user_attr(LEASE, lease)
        watcher.look()

    is_safe = url is None
    assert study.trials[trial.number].state == (TrialState.RUNNING if is_safe else TrialState.FAIL)
    assert (child.poll() is None) == is_safe
    assert next(event.message for event in told if event.message) == "waiting for room: it is full"


@pytest.mark.parametrize("num_running", [1, 40])
def test_a_look_is_one_list_of_unfinished_trials_and_one_read_of_the_studys_attributes(
    stored_store, small_study, num_running
):
    study = open_study(stored_store, "demo")
    finished = {trial._trial_id for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
    elsewhere = this_worker(0).model_copy(update={"host": "elsewhere"})
    for _ in range(num_running):
        trial_of(study, elsewhere)
    watcher = Watcher(study, small_study.model_copy(update={"store": str(stored_store)}), [], lambda event: None)
    watcher.look()

    with statements(study) as apart:
        study.get_trials(deepcopy=False)
        study.user_attrs  # noqa: B018
    with statements(study) as looking:
        watcher.look()

    assert texts(looking) == texts(apart)
    of_trials = [parameters for text, parameters in looking if "trial_user_attributes" in text]
    assert of_trials
    assert not any(finished.intersection(parameters) for parameters in of_trials)
