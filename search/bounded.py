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
    points, point_of = np.unique(losses, axis=0, return_inverse=True)
    is_member = _not_dominated(points)[point_of.reshape(-1)]
    return [trial.number for trial, is_on_front in zip(feasible, is_member, strict=True) if is_on_front]


def _not_dominated(points: Array) -> Array:
    """Return which of different points, sorted by their first loss, then the second and so on, no other dominates."""
    if points.shape[1] == 2:  # a front of thousands of points takes seconds below
        before = np.minimum.accumulate(points[:, 1])
        return np.concatenate([[True], points[1:, 1] < before[:-1]])
    is_member = np.zeros(len(points), dtype=bool)
    left = np.arange(len(points))
    while left.size:
        first = left[0]  # only what comes before a point could dominate it
        is_member[first] = True
        left = left[(points[left] < points[first]).any(axis=1)]
    return is_member


class _Part(optuna.Study):
    """A study of which a part is seen, as it is now: for each parameter samplers ask for all its trials again."""

    def __init__(self, study: optuna.Study, most: int) -> None:
        vars(self).update(vars(study))
        self._seen = within_bound(study.get_trials(deepcopy=False), study.directions, most)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self._seen if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials
