from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from search.order import SlotState, WorkOrder, read_state, write_state
from search.pace import (
    DUPLICATES_BEFORE_RANDOM,
    MAX_DUPLICATES_IN_A_ROW,
    MAX_FAILURES_IN_A_ROW,
    must_wait,
    next_draw,
    stop_reason,
    trouble,
)
from search.processes import this_worker
from search.resume import hand_back_trials, reclaim_lost_trials
from search.retry import DISK_TROUBLE
from search.study import Budget
from search.trials import unfinished

ORDER = WorkOrder(store=Path("s"), url=None, study="x", slot=0, first_trial=0, deadline=None, until_trial=None)


STATES = {
    "complete": TrialState.COMPLETE,
    "reused": TrialState.COMPLETE,
    "infeasible": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
    "waiting": TrialState.WAITING,
}


def trials_of(*states):
    """Frozen trials numbered from 0, in our words for their states."""
    attributes = {"reused": {"reused_from": 0}, "failed": {"stage": "render"}}
    found = []
    for number, state in enumerate(states):
        trial = optuna.create_trial(
            state=STATES[state],
            values=[0.5, 0.5] if STATES[state] == TrialState.COMPLETE else None,
            user_attrs=attributes.get(state, {}),
            system_attrs={"constraints:c": 1.0} if state == "infeasible" else {},
        )
        trial.number = number
        found.append(trial)
    return found


def test_a_study_stops_when_complete_and_infeasible_trials_use_up_the_budget():
    trials = trials_of("complete", "infeasible", "failed", "reused")

    assert stop_reason(trials, Budget(trials=3), ORDER, now=0) is None
    assert "budget of 2" in stop_reason(trials, Budget(trials=2), ORDER, now=0)


def test_a_study_stops_at_its_deadline():
    order = ORDER.model_copy(update={"deadline": 100.0})

    assert stop_reason([], Budget(time_s=60), order, now=99.0) is None
    assert "60 s" in stop_reason([], Budget(time_s=60), order, now=100.0)


def test_a_single_point_runs_whatever_the_budget_and_then_stops():
    order = ORDER.model_copy(update={"until_trial": 1})

    assert stop_reason(trials_of("complete", "waiting"), Budget(trials=1), order, now=0) is None
    assert "trial 1" in stop_reason(trials_of("complete", "complete"), Budget(trials=9), order, now=0)


def test_who_is_to_run_a_single_point_waits_while_another_worker_has_it():
    order = ORDER.model_copy(update={"until_trial": 1})

    assert not must_wait(trials_of("running", "waiting"), Budget(trials=1), order)
    assert must_wait(trials_of("complete", "running"), Budget(trials=1), order)


@pytest.mark.parametrize(
    ("states", "waits"),
    [(("complete",), False), (("complete", "running"), True), (("running",), False), (("running", "running"), True)],
    ids=["none in flight", "the last one in flight", "room for one more", "two in flight"],
)
def test_a_worker_waits_while_the_trials_in_flight_may_use_up_the_budget(states, waits):
    assert must_wait(trials_of(*states), Budget(trials=2), ORDER) is waits


def test_failures_in_a_row_end_a_run_but_are_not_held_against_the_next():
    trials = trials_of("complete", *["failed"] * MAX_FAILURES_IN_A_ROW)

    assert "trials in a row failed" in trouble(trials, ORDER)
    assert trouble(trials, ORDER.model_copy(update={"first_trial": len(trials)})) is None
    assert trouble([*trials, *trials_of("complete")], ORDER) is None


def test_failures_of_presets_that_were_queued_before_the_run_count_and_earlier_ones_do_not():
    """In a new study everything is queued; in an old one others were tried after what still waits."""
    of_before = trials_of("complete", *["failed"] * MAX_FAILURES_IN_A_ROW, "waiting", "failed", "waiting")
    order = ORDER.model_copy(update={"first_trial": len(of_before), "unfinished": unfinished(of_before)})
    now = trials_of("complete", *["failed"] * (MAX_FAILURES_IN_A_ROW + 3), *["failed"] * (MAX_FAILURES_IN_A_ROW - 2))

    assert order.unfinished == (11, 13)
    assert trouble(of_before, order) is None
    assert trouble(now[:-1], order) is None
    assert "10 trials in a row failed" in trouble(now, order)


def test_presets_that_repeat_each_other_say_nothing_about_the_sampler():
    queued = trials_of("complete", *["waiting"] * MAX_DUPLICATES_IN_A_ROW)
    order = ORDER.model_copy(update={"first_trial": len(queued), "unfinished": unfinished(queued)})
    repeated = trials_of("complete", *["reused"] * MAX_DUPLICATES_IN_A_ROW)

    assert next_draw(repeated, order) == "sampler"
    assert trouble(repeated, order) is None


def test_after_some_duplicates_points_are_drawn_at_random_and_after_many_the_space_is_used_up():
    assert next_draw(trials_of("complete", "reused"), ORDER) == "sampler"
    assert next_draw(trials_of("complete", *["reused"] * DUPLICATES_BEFORE_RANDOM), ORDER) == "random"
    assert "space seems used up" in trouble(trials_of("complete", *["reused"] * MAX_DUPLICATES_IN_A_ROW), ORDER)


def test_a_grid_is_never_replaced_by_chance_nor_called_used_up_for_its_repeats():
    trials = trials_of("complete", *["reused"] * MAX_DUPLICATES_IN_A_ROW)

    assert next_draw(trials, ORDER, is_grid=True) == "sampler"
    assert stop_reason(trials, Budget(trials=9), ORDER, now=0, is_grid=True) is None


def test_the_state_of_a_slot_survives_its_workers(tmp_path):
    assert read_state(tmp_path) == SlotState()
    write_state(tmp_path, SlotState(restarts_at_last_finish=3))

    assert read_state(tmp_path).restarts_at_last_finish == 3


def test_what_a_disk_refused_is_none_of_the_failures_that_stop_a_study():
    failed = trials_of(*["failed"] * MAX_FAILURES_IN_A_ROW)
    assert trouble(failed, ORDER) is not None
    for trial in failed:
        trial.set_user_attr(DISK_TROUBLE, True)
    assert trouble(failed, ORDER) is None


def test_trials_that_workers_lost_or_handed_back_neither_count_as_failures_nor_break_a_row():
    """A worker of ten slots that leaves, or a host that dies, stops nobody else."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    leaving = this_worker(0, crew="b-0").model_dump()
    dead = leaving | {"started": "1", "crew": "c-0"}
    for worker in [leaving, dead] * MAX_FAILURES_IN_A_ROW:
        trial = study.ask()
        trial.set_user_attr("worker", worker)
    given_up = [*hand_back_trials(study, "b-0"), *reclaim_lost_trials(study)]
    lost = [trial for trial in study.trials if trial.number in given_up]
    failed = trials_of(*["failed"] * MAX_FAILURES_IN_A_ROW)

    assert len(lost) == 2 * MAX_FAILURES_IN_A_ROW
    assert trouble(lost, ORDER) is None
    assert trouble([*failed[1:], *lost], ORDER) is None
    assert "10 trials in a row failed" in trouble([*failed[1:], *lost, failed[0]], ORDER)
