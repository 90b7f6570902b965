"""Leases: who looks measures with its own monotonic clock, so clocks of other hosts do not matter."""

import datetime
import time

import optuna
import pytest
from optuna.trial import TrialState

from search.lease import GRACE_S, LEASE, MAX_STEP_S, LeaseWatch, leased, renewing
from search.processes import is_local, this_worker
from search.resume import reclaim_lost_trials


@pytest.fixture
def study():
    return optuna.create_study(directions=["maximize", "minimize"])


class Observer:
    """A watch whose clock is moved by hand."""

    def __init__(self, study, start=0.0):
        self.study, self.now = study, start
        self.watch = LeaseWatch(clock=lambda: self.now)

    def look(self, after_s=0.0):
        self.now += after_s
        return self.watch.lost(self.study.get_trials(deepcopy=False))


def test_a_lease_that_moves_is_never_lost(study):
    trial, observer = study.ask(), Observer(study)

    for count in range(200):
        trial.set_user_attr(LEASE, count)
        assert observer.look(after_s=5.0) == set()


def test_a_lease_that_stands_still_is_lost_after_the_grace_and_not_before(study):
    study.ask().set_user_attr(LEASE, 7)
    observer = Observer(study)

    looks = [observer.look(after_s=1.0) for _ in range(int(GRACE_S) + 1)]

    assert looks[:-1] == [set()] * int(GRACE_S)
    assert looks[-1] == {0}


def test_a_trial_that_never_had_a_lease_is_lost_after_the_grace(study):
    """Its worker died between popping the trial and its first sign of life."""
    study.ask()
    observer = Observer(study)
    observer.look()

    while observer.look(after_s=5.0) == set():
        assert observer.now < GRACE_S
    assert observer.now == GRACE_S


def test_time_in_which_an_observer_could_not_look_is_not_held_against_the_workers(study):
    """The database was away for ten minutes: nobody could renew, and nobody is lost at the first look after it."""
    study.ask().set_user_attr(LEASE, 7)
    observer = Observer(study)
    observer.look()

    assert observer.look(after_s=600.0) == set()
    assert GRACE_S / MAX_STEP_S > 4


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_worker_whose_clock_is_an_hour_off_keeps_its_trial(study, hours):
    """What a skewed host writes are its times; the trial's beginning lies an hour in the future or in the past."""
    trial = study.ask()
    stored = study._storage.get_trial(trial._trial_id)
    stored.datetime_start += datetime.timedelta(hours=hours)
    study._storage._set_trial(trial._trial_id, stored)
    trial.set_user_attr("worker", this_worker(0).model_copy(update={"host": "elsewhere"}).model_dump())
    observer = Observer(study, start=3600.0 * (hours + 2))
    assert study.trials[0].datetime_start == stored.datetime_start

    for count in range(100):
        trial.set_user_attr(LEASE, count)
        observer.now += 5.0
        assert reclaim_lost_trials(study, observer.watch) == []
    assert study.trials[0].state == TrialState.RUNNING


def test_a_worker_renews_until_its_block_ends(study):
    trial = study.ask()
    with renewing(lambda count: trial.set_user_attr(LEASE, count), "test", renew_s=0.01):
        while study.trials[0].user_attrs.get(LEASE, 0) < 3:
            time.sleep(0.01)
    after = study.trials[0].user_attrs[LEASE]
    time.sleep(0.1)

    assert study.trials[0].user_attrs[LEASE] == after


def test_a_worker_whose_trial_was_taken_away_stops_renewing_quietly(study):
    trial = study.ask()
    with leased(trial):
        study.tell(trial.number, state=TrialState.FAIL)

    assert study.trials[0].state == TrialState.FAIL


def test_a_process_id_of_another_kernel_or_container_means_nothing_here():
    mine = this_worker(0)

    assert is_local(mine)
    assert not is_local(mine.model_copy(update={"kernel": "another boot"}))
    assert not is_local(mine.model_copy(update={"host": "elsewhere"}))
