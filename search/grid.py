"""A sampler that tries every point of a finite space once, in an order drawn by its seed."""

import random
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from spaces.points import Params


class GridSampler(BaseSampler):
    """Give each trial a point that no trial of the study has; random ones if there is none left.

    Unlike Optuna's sampler of the same name it knows parameters that are asked for only after some answers.

    Args:
        points: The parameters of every point.
        seed: Of their order.
    """

    def __init__(self, points: Sequence[Params], *, seed: int) -> None:
        self._points = {_key(point): point for point in random.Random(seed).sample(points, len(points))}
        self._chosen: dict[int, Params] = {}
        self._random = RandomSampler(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Choose the trial's point."""
        self._chosen = {trial.number: self._next_free(study.get_trials(deepcopy=False)) or {}}

    def is_drained(self, trials: Sequence[FrozenTrial]) -> bool:
        """Say whether one more trial would find no point: all were given away, and none is queued."""
        return all(trial.state != TrialState.WAITING for trial in trials) and self._next_free(trials) is None

    def _next_free(self, trials: Sequence[FrozenTrial]) -> Params | None:
        tried = {_key(trial.params) for trial in trials}
        return next((point for key, point in self._points.items() if key not in tried), None)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return nothing: every parameter is looked up by itself."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return nothing, as above."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the parameter of the trial's point; a preset that fixes some parameters may need others: random."""
        chosen = self._chosen.get(trial.number, {})
        if param_name in chosen:
            return chosen[param_name]
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def tried_out(grid: GridSampler | None, trials: Sequence[FrozenTrial]) -> str | None:
    """Return that a study has tried its whole grid, if it has one; what is under way may yet be tried again."""
    is_busy = any(trial.state == TrialState.RUNNING for trial in trials)
    return None if grid is None or is_busy or not grid.is_drained(trials) else "every point of the space has been tried"


def _key(params: Params) -> frozenset[tuple[str, Any]]:
    return frozenset((name, round(value, 9) if isinstance(value, float) else value) for name, value in params.items())
