"""Optuna samplers by the kind a study file names."""

from collections.abc import Callable, Mapping

from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

from hyquant.config import digest
from search.retry import known_experiments
from search.study import SamplerConfig


def _tpe(seed: int, num_startup_trials: int) -> BaseSampler:
    """Multivariate and grouped, because parameters are conditional; the liar keeps two slots apart."""
    return TPESampler(seed=seed, n_startup_trials=num_startup_trials, multivariate=True, group=True, constant_liar=True)


def _gp(seed: int, num_startup_trials: int) -> BaseSampler:
    return GPSampler(seed=seed, n_startup_trials=num_startup_trials)


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


def build_sampler(config: SamplerConfig, *, slot: int, num_trials: int) -> BaseSampler:
    """Build the sampler of one worker.

    Samplers draw from a generator that starts anew with every process, so its seed depends on the slot and on how far
    the study is: otherwise two slots, or a resumed study, would draw the same points again.
    """
    with known_experiments():
        return SAMPLERS[config.kind](derived_seed(config.seed, slot, num_trials), config.num_startup_trials)


def derived_seed(seed: int, slot: int, num_trials: int) -> int:
    """Return a 32-bit seed for one slot at one point of a study."""
    return int(digest([seed, slot, num_trials], length=8), 16)
