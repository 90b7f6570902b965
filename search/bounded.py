"""A sampler that sees a bounded part of a long study, so that choosing a point does not get slower with every trial.

What it sees: the front, the trials that are not finished, and the newest of the rest, in order of their numbers. A
study that is no longer than the bound is seen whole, and every draw is what it is without a bound. The record is not
touched: whether a config is known already, the front and every report are decided from all trials.
"""

import copy
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

Array = np.ndarray[Any, Any]


class BoundedSampler(BaseSampler):
    """Ask another sampler, which sees a bounded part of the study.

    Args:
        sampler: It must read trials through the study that it is given, as Optuna's TPE and GP do.
        most: Finished trials that it sees at most.
    """

    def __init__(self, sampler: BaseSampler, *, most: int) -> None:
        self.sampler, self.most = sampler, most
        self._seen: optuna.Study | None = None

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Choose which trials are seen while this one's parameters are chosen."""
        self._seen = _Part(study, self.most)
        self.sampler.before_trial(self._seen, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Ask the sampler."""
        return self.sampler.infer_relative_search_space(self._seen or study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Ask the sampler."""
        return self.sampler.sample_relative(self._seen or study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Ask the sampler."""
        return self.sampler.sample_independent(self._seen or study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Tell the sampler."""
        self.sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Let the sampler draw other numbers than its copies do."""
        self.sampler.reseed_rng()


def within_bound(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection], most: int) -> list[FrozenTrial]:
    """Return what is seen of a study: all of it, or unfinished trials, the front and the newest others, by number.

    Args:
        trials: All trials, by number.
        directions: One per objective.
        most: Finished trials that are seen at most; of a larger front the newest half of them, so that new trials
            which are not on it are always among them.
    """
    finished = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(finished) <= most:
        return list(trials)
    front = _front(finished, directions)[-(most // 2) :]
    members = set(front)
    others = [trial.number for trial in finished if trial.number not in members]
    seen = members | set(others[len(others) - (most - len(front)) :])
    return [trial for trial in trials if trial.number in seen or not trial.state.is_finished()]


def _front(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[int]:
    """Return the numbers of the complete, feasible trials that no other of them dominates."""
    feasible = [t for t in trials if t.state == TrialState.COMPLETE and not any(v > 0 for v in t.constraints.values())]
    if not feasible:
        return []
    signs = [1.0 if direction == StudyDirection.MINIMIZE else -1.0 for direction in directions]
    losses: Array = np.array([trial.values for trial in feasible]) * signs
    left, members = np.arange(len(feasible)), []
    while left.size:
        # Nothing dominates the point of the smallest sum; what it dominates, itself included, goes.
        best = left[np.argmin(losses[left].sum(axis=1))]
        is_equal = (losses[left] == losses[best]).all(axis=1)
        members += left[is_equal].tolist()
        left = left[(losses[left] < losses[best]).any(axis=1)]
    return sorted(feasible[index].number for index in members)


class _Part(optuna.Study):
    """A study of which a part is seen; which trials is decided once, and those that came since are seen too."""

    def __init__(self, study: optuna.Study, most: int) -> None:
        vars(self).update(vars(study))
        trials = study.get_trials(deepcopy=False)
        seen = {trial.number for trial in within_bound(trials, study.directions, most)}
        self._hidden = {trial.number for trial in trials if trial.number not in seen}

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        found = super()._get_trials(deepcopy=False, states=states, use_cache=use_cache)
        trials = [trial for trial in found if trial.number not in self._hidden] if self._hidden else found
        return copy.deepcopy(trials) if deepcopy else trials
