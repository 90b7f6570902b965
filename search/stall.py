"""When a study has stopped getting better: its hypervolume grows by next to nothing over many trials.

The hypervolume is measured to a reference point a tenth of the front's extent beyond the worst values on the front, so
that its ends count too, and one hopeless trial does not make every difference look small. An objective in which the
front has no extent, as where it is a single point, is measured from the worst complete trial instead; one that is the
same for all complete trials counts as a factor of 1. The front of now and that of some trials ago are measured to the
same point; scaling an objective changes nothing in their ratio.
"""

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial

from search.grid import tried_out
from search.hypervolume import Losses, hypervolume
from search.picks import Direction, losses
from search.samplers import grid_of_study
from search.study import Budget, StudyConfig
from search.trials import comparable, count_states, is_evaluated, num_evaluated, trial_state

USED_UP = "the budget is used"
_BEYOND = 0.1


def stall_reason(trials: Sequence[FrozenTrial], budget: Budget, directions: Sequence[Direction]) -> str | None:
    """Return why a study has stopped getting better, or None.

    Args:
        trials: All trials of the study, by number; simulated latencies beside native ones are to be left out.
        budget: After how many evaluated trials without gain a study stops, and what a gain is.
        directions: One per objective.
    """
    if budget.stall_trials is None:
        return None
    evaluated = [trial for trial in trials if is_evaluated(trial)]
    now = _complete_losses(evaluated, directions)
    before = _complete_losses(evaluated[: -budget.stall_trials], directions)
    if not before:
        return None
    gain = growth(before, now)
    if gain > budget.stall_gain:
        return None
    return (
        f"the last {budget.stall_trials} evaluated trials made the front better by {100 * gain:.2g} % of its "
        f"hypervolume, and {100 * budget.stall_gain:g} % is asked for"
    )


def study_stall(trials: Sequence[FrozenTrial], config: StudyConfig) -> str | None:
    """Return why a study with these trials has stopped getting better, or None."""
    if config.budget.stall_trials is None:
        return None
    compared = {trial.number for trial in comparable(trials, [objective.metric for objective in config.objectives])}
    telling = [trial for trial in trials if trial.number in compared or trial_state(trial) != "complete"]
    return stall_reason(telling, config.budget, [objective.direction for objective in config.objectives])


def why_over(study: optuna.Study, config: StudyConfig) -> str | None:
    """Return why no further trial is to come, whatever the time; None if trials are to come."""
    trials = study.get_trials(deepcopy=False)
    if num_evaluated(count_states(trials)) >= config.budget.trials:
        return USED_UP
    return study_stall(trials, config) or tried_out(grid_of_study(config), trials)


def growth(before: Sequence[Losses], now: Sequence[Losses]) -> float:
    """Return which share of today's hypervolume was not there before.

    Args:
        before: Losses of the complete trials at an earlier time, at least one.
        now: The same today; holds those before.
    """
    reference = reference_point(now)
    volume = hypervolume(now, reference)
    return 0.0 if volume == 0.0 else 1.0 - hypervolume(before, reference) / volume


def reference_point(points: Sequence[Losses]) -> Losses:
    """Return the point that a hypervolume is measured to; see the module's first lines."""
    front = [p for p in points if not any(q != p and all(map(float.__le__, q, p)) for q in points)]
    found = []
    for on_front, everywhere in zip(zip(*front, strict=True), zip(*points, strict=True), strict=True):
        best, worst = min(on_front), max(on_front)
        if worst == best:
            worst = max(everywhere)
        found.append(worst + _BEYOND * (worst - best) if worst > best else best + 1.0)
    return tuple(found)


def _complete_losses(trials: Sequence[FrozenTrial], directions: Sequence[Direction]) -> list[Losses]:
    return [losses(trial.values, directions) for trial in trials if trial_state(trial) == "complete"]
