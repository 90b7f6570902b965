"""When a worker may begin another trial, when it waits for others, and when a study is over: pure decisions."""

from collections.abc import Sequence
from typing import Literal

from optuna.trial import FrozenTrial, TrialState

from search.order import WorkOrder
from search.retry import DISK_TROUBLE
from search.study import Budget
from search.trials import is_evaluated, trailing, trial_reason

MAX_FAILURES_IN_A_ROW = 10
DUPLICATES_BEFORE_RANDOM = 3
MAX_DUPLICATES_IN_A_ROW = 60
"""A sampler that has converged proposes what it knows; after a few duplicates points are drawn at random, and when even
these are all known, the space is used up. A grid has points of equal configs, goes on, and ends when it is empty."""


def stop_reason(
    trials: Sequence[FrozenTrial], budget: Budget, order: WorkOrder, *, now: float, is_grid: bool = False
) -> str | None:
    """Return why no further trial is to be begun, or None.

    Args:
        trials: All trials of the study.
        budget: Evaluated trials to reach.
        order: What this run was started for.
        now: Monotonic time of this host, in seconds, as `order.deadline` is.
        is_grid: Whether points come from a grid, which ends by itself.
    """
    if order.until_trial is not None:
        is_done = any(trial.number == order.until_trial and trial.state.is_finished() for trial in trials)
        return f"trial {order.until_trial} has finished" if is_done else None
    if sum(map(is_evaluated, trials)) >= budget.trials:
        return f"the budget of {budget.trials} evaluated trials is used"
    if order.is_out_of_time(now=now):
        return f"the budget of {budget.time_s:g} s is used"
    return trouble(trials, order, is_grid=is_grid)


def trouble(trials: Sequence[FrozenTrial], order: WorkOrder, *, is_grid: bool = False) -> str | None:
    """Return why a study cannot go on although its budget is not used, or None.

    Trials that a worker lost, handed back or could not write down say nothing about the study: they neither count nor
    break a row. What was queued before the run can fail in it, but its repeats are none of the sampler's.
    """
    telling = [trial for trial in trials if not _was_given_up(trial)]
    of_this_run = [t for t in telling if t.number >= order.first_trial or t.number in order.unfinished]
    if trailing(of_this_run, "failed") >= MAX_FAILURES_IN_A_ROW:
        last = next(trial for trial in reversed(of_this_run) if trial.state == TrialState.FAIL)
        return f"{MAX_FAILURES_IN_A_ROW} trials in a row failed, the last because {trial_reason(last)}"
    if not is_grid and trailing(_begun(telling, order), "reused") >= MAX_DUPLICATES_IN_A_ROW:
        return f"the space seems used up: {MAX_DUPLICATES_IN_A_ROW} points in a row had been evaluated before"
    return None


def _was_given_up(trial: FrozenTrial) -> bool:
    """Say whether a trial failed for another reason than one of our errors or a bug, which leave their stage."""
    return trial.state == TrialState.FAIL and ("stage" not in trial.user_attrs or DISK_TROUBLE in trial.user_attrs)


def must_wait(trials: Sequence[FrozenTrial], budget: Budget, order: WorkOrder) -> bool:
    """Say whether the trials in flight may use the budget up, so that one more might be one too many.

    Who is to run one trial waits once another worker has it in hand.
    """
    if order.until_trial is not None:
        return trials[order.until_trial].state != TrialState.WAITING
    in_flight = sum(trial.state == TrialState.RUNNING for trial in trials)
    return in_flight > 0 and sum(map(is_evaluated, trials)) + in_flight >= budget.trials


def next_draw(
    trials: Sequence[FrozenTrial], order: WorkOrder, *, is_grid: bool = False
) -> Literal["sampler", "random"]:
    """Say who draws the next point: the study's sampler, or, unless that is a grid, chance after several duplicates."""
    if is_grid:
        return "sampler"
    return "random" if trailing(_begun(trials, order), "reused") >= DUPLICATES_BEFORE_RANDOM else "sampler"


def _begun(trials: Sequence[FrozenTrial], order: WorkOrder) -> list[FrozenTrial]:
    """Return the trials that were made since the run began."""
    return [trial for trial in trials if trial.number >= order.first_trial]
