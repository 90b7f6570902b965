"""How rank 0 of a slot ends its work, without a model."""

import time
from types import SimpleNamespace

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from search.grid import GridSampler
from search.leader import Leader
from search.lease import RENEW_S, LeaseWatch
from search.order import WorkOrder, ask_to_leave
from search.pauses import Pauses
from search.processes import this_worker
from search.resume import NO_BLAME
from search.storage import open_study
from search.study import Budget, ConfirmConfig
from tests.toys.statements import statements, texts

CONFIRM = ConfirmConfig()


class StillWaiting(Exception):
    """The leader has rested many times."""


@pytest.fixture
def study():
    return optuna.create_study(directions=["maximize", "minimize"])


@pytest.fixture
def make_leader(study, tmp_path, monkeypatch):
    """A leader that is about to measure the front again, and gives up after so many rests."""

    def make(*, is_out_of_time=False, on_rest=lambda order: None, confirm=CONFIRM):
        deadline = time.monotonic() - 1.0 if is_out_of_time else None
        order = WorkOrder(
            store=tmp_path, url=None, study="s", slot=0, first_trial=0, deadline=deadline, until_trial=None
        )
        order.folder.mkdir(parents=True, exist_ok=True)
        leader = Leader.__new__(Leader)
        leader._study, leader._order, leader._num_done, leader._grid = study, order, 0, None
        leader._was_tried_out = False
        leader._bench = SimpleNamespace(config=SimpleNamespace(confirm=confirm))
        rests = iter(range(20))

        def rest(trials):
            on_rest(order)
            if next(rests, None) is None:
                raise StillWaiting

        leader._rest, leader._pauses = rest, Pauses(1.0)
        return leader

    monkeypatch.setattr("search.confirming.pending", lambda study, config: [])
    return make


def test_a_grid_is_done_when_two_looks_say_so(make_leader, study):
    """Between two of them a lost trial is failed but not queued again yet."""
    leader, grid = make_leader(), GridSampler([{"x": 1}], seed=0)
    leader._grid = grid
    looks = [TrialState.RUNNING, TrialState.FAIL, TrialState.WAITING, TrialState.COMPLETE, TrialState.COMPLETE]

    found = [leader._tried_out([trial_in(state)]) for state in looks]

    assert found == [None] * 4 + ["every point of the space has been tried"]


def trial_in(state):
    return optuna.create_trial(
        state=state,
        params={"x": 1},
        distributions={"x": IntDistribution(1, 1)},
        values=[1.0, 1.0] if state == TrialState.COMPLETE else None,
    )


def add_running(study, *, crew):
    study.ask().set_user_attr("worker", this_worker(0, crew=crew).model_dump())


def test_trials_under_way_are_awaited_before_the_front_is_measured_again(make_leader, study):
    add_running(study, crew="there-0")

    with pytest.raises(StillWaiting):
        make_leader()._confirm_front()


def test_out_of_time_a_run_waits_for_its_own_trials_alone(make_leader, study):
    add_running(study, crew="there-0")
    leader = make_leader(is_out_of_time=True)

    leader._confirm_front()

    add_running(study, crew="")
    with pytest.raises(StillWaiting):
        leader._confirm_front()


def test_a_worker_that_is_asked_to_leave_waits_for_nobody(make_leader, study):
    add_running(study, crew="there-0")

    make_leader(on_rest=lambda order: ask_to_leave(order.folder))._confirm_front()


def test_a_study_that_measures_nothing_again_waits_for_nobody(make_leader):
    assert make_leader()._may_confirm()
    assert not make_leader(confirm=None)._may_confirm()


def test_who_waits_for_the_trials_of_others_asks_for_one_list_of_trials_each_time_and_less_and_less_often(
    make_leader, small_study, stored_store, monkeypatch
):
    study = open_study(stored_store, "demo")
    running = study.ask()
    leader = make_leader()
    del leader._rest  # the real one
    leader._study, leader._watch, leader._blame = study, LeaseWatch(), NO_BLAME
    leader._followers = SimpleNamespace(keep_alive=lambda: None)
    num_evaluated = 13  # of the stored study
    budget = Budget(trials=num_evaluated + 1, stall_trials=num_evaluated - 1)
    leader._bench.config = small_study.model_copy(update={"budget": budget})
    study.get_trials(deepcopy=False)
    with statements(study) as one_list:
        study.get_trials(deepcopy=False)
    slept: list[float] = []
    sent: list[list[str]] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        sent.append(texts(waiting))
        waiting.clear()
        if len(slept) == 5:
            study.tell(running, state=optuna.trial.TrialState.FAIL)
            raise StillWaiting

    monkeypatch.setattr("search.leader.time.sleep", sleep)
    with statements(study) as waiting, pytest.raises(StillWaiting):
        leader._wait_for_turn()

    assert sent == [texts(one_list)] * 5
    assert slept == [1.0, 2.0, 4.0, RENEW_S, RENEW_S]
