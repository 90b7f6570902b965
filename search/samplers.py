"""Optuna samplers by the kind a study file names."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from hyquant.config import digest
from search.bounded import BoundedSampler
from search.grid import GridSampler
from search.retry import known_experiments
from search.study import SamplerConfig, StudyConfig
from spaces.points import count_points, points
from spaces.space import SearchSpace

logger = logging.getLogger(__name__)


def _tpe(seed: int, num_startup_trials: int) -> BaseSampler:
    """Multivariate and grouped, because parameters are conditional; the liar keeps two slots apart."""
    return TPESampler(seed=seed, n_startup_trials=num_startup_trials, multivariate=True, group=True, constant_liar=True)


class _GPInOneThread(GPSampler):
    """Chooses in one thread: the matrices are small, and on busy cores torch's threads made it ten times slower."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Choose as `GPSampler` does."""
        from hyquant.threads import one_thread_of_arithmetic  # loads torch, as this does

        with one_thread_of_arithmetic():
            return super().sample_relative(study, trial, search_space)


def _gp(seed: int, num_startup_trials: int) -> BaseSampler:
    return _GPInOneThread(seed=seed, n_startup_trials=num_startup_trials)


def _nsga2(seed: int, num_startup_trials: int) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=max(2, num_startup_trials))


def _random(seed: int, num_startup_trials: int) -> BaseSampler:
    return RandomSampler(seed=seed)


SAMPLERS: Mapping[str, Callable[[int, int], BaseSampler]] = {
    "tpe": _tpe,
    "gp": _gp,
    "nsga2": _nsga2,
    "random": _random,
}

BOUNDS: Mapping[str, int] = {"tpe": 500, "gp": 100}
"""Finished trials that a sampler sees at most (`search.bounded`), so that it takes under 2 s of one core to choose a
point, in `tests/search_tests/test_bounded.py` after 10,000 trials. The others are that fast without a bound.
"""


def build_sampler(config: StudyConfig, *, slot: int, num_trials: int) -> BaseSampler:
    """Build the sampler of one worker of a study.

    Samplers draw from a generator that starts anew with every process, so its seed depends on the slot and on how far
    the study is: otherwise two slots, or a resumed study, would draw the same points again.
    """
    kind = kind_of_study(config)
    logger.info("sampler kind=%s", kind)
    return sampler_for(
        config.sampler.model_copy(update={"kind": kind}),
        config.valid_space,
        seed=derived_seed(config.sampler.seed, slot, num_trials),
        num_steps=config.workload.settings.num_steps,
        num_trials=config.budget.trials,
    )


def grid_of_study(config: StudyConfig) -> GridSampler | None:
    """Return the grid that a study's points are drawn from, in any order; None if it has another sampler."""
    sampler = build_sampler(config, slot=0, num_trials=0) if kind_of_study(config) == "grid" else None
    return sampler if isinstance(sampler, GridSampler) else None


def kind_of_study(config: StudyConfig) -> str:
    """Return which sampler draws a study's points: what `auto` stands for, where the study says that."""
    num_steps, num_trials = config.workload.settings.num_steps, config.budget.trials
    return chosen_kind(config.sampler.kind, config.valid_space, num_steps=num_steps, num_trials=num_trials)


def sampler_for(
    config: SamplerConfig, space: SearchSpace, *, seed: int, num_steps: int, num_trials: int
) -> BaseSampler:
    """Build a sampler of points of a space.

    Args:
        config: Which one.
        space: What it samples from.
        seed: Of its random numbers, in place of the config's.
        num_steps: Denoising steps of the study's renderings.
        num_trials: How many trials the study is to evaluate.
    """
    kind = chosen_kind(config.kind, space, num_steps=num_steps, num_trials=num_trials)
    if kind == "grid":
        return GridSampler([params for params, _ in points(space, num_steps=num_steps)], seed=seed)
    with known_experiments():
        sampler = SAMPLERS[kind](seed, config.num_startup_trials)
    return BoundedSampler(sampler, most=BOUNDS[kind]) if kind in BOUNDS else sampler


def chosen_kind(kind: str, space: SearchSpace, *, num_steps: int, num_trials: int) -> str:
    """Return which sampler a kind stands for: itself, or what `auto` takes for this space and number of trials.

    Grid where the budget covers the space: every point is evaluated, and no other sampler can do better. Else TPE:
    on the tabular benchmark (docs/evaluation.md), with ladder and presets, it needed 18 trials to 95 % of the area;
    random points needed 29, NSGA-II 31.5, grid 40. GP is level with it or behind after 20 trials on the ladder, and
    takes about 50 times as long to choose a point.
    """
    if kind != "auto":
        return kind
    if count_points(space, num_steps=num_steps, at_most=num_trials + 1) <= num_trials:
        return "grid"
    return "tpe"


def derived_seed(seed: int, slot: int, num_trials: int) -> int:
    """Return a 32-bit seed for one slot at one point of a study."""
    return int(digest([seed, slot, num_trials], length=8), 16)
