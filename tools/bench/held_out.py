"""How many held-out prompts does a certificate need? Simulated comparisons, whose truth is known.

    python -m tools.bench.held_out

Prints the tables of docs/evaluation.md: how often a model exactly on its margin passes, by Student's t and by the
test that certificates use, last where most prompts score exactly the same; how many prompts an equal model needs; and
how often the bootstrap interval covers the true mean. Half of the variance is the prompt's, half the seed's. Takes
about ten minutes on one core.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.random import Generator

from metrics.statistics.clusters import Floats
from metrics.statistics.intervals import mean_interval
from metrics.statistics.non_inferiority import p_below
from metrics.statistics.sample_sizes import clusters_to_pass
from tools.bench.tables import markdown

SEEDS_PER_PROMPT = 2
PROMPTS = (8, 16, 24, 32, 48, 64)
MARGINS = (1.0, 0.7, 0.5, 0.35, 0.25)  # in standard deviations of the paired differences
COMPARISONS = 20_000
PILOT = 20_000  # prompts from which a sample size is worked out


def _lognormal(rng: Generator, shape: tuple[int, ...], sigma: float) -> Floats:
    drawn = rng.lognormal(0.0, sigma, shape)
    return (drawn - np.exp(sigma**2 / 2)) / np.sqrt((np.exp(sigma**2) - 1) * np.exp(sigma**2))


def _rare(rng: Generator, shape: tuple[int, ...], share: float) -> Floats:
    """Most clips lose next to nothing; a share of them loses an exponential amount."""
    drawn = (rng.random(shape) < share) * rng.exponential(1.0, shape) + 0.1 * rng.standard_normal(shape)
    return (drawn - share) / np.sqrt(2 * share - share**2 + 0.01)


LOSSES: dict[str, Callable[[Generator, tuple[int, ...]], Floats]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails": lambda rng, shape: rng.standard_t(3, shape) / np.sqrt(3),
    "few gain much": lambda rng, shape: 1.0 - rng.exponential(1.0, shape),
    "few lose much": lambda rng, shape: rng.exponential(1.0, shape) - 1.0,
    "lognormal": lambda rng, shape: _lognormal(rng, shape, 0.8),
    "very skewed": lambda rng, shape: _lognormal(rng, shape, 1.0),
    "one clip in ten": lambda rng, shape: _rare(rng, shape, 0.1),
}
"""Losses of single clips with mean 0 and standard deviation 1; what is positive is worse than float."""

BAD_SHARES = {"one prompt in ten": 0.1, "one prompt in twenty": 0.05}
"""Shares of prompts that lose an exponential amount with all of their seeds, while the rest lose exactly nothing."""


def simulated(kind: str, num_comparisons: int, num_prompts: int, seed: int) -> Floats:
    """Return prompts' mean losses [comparisons, prompts]: half of the variance is the prompt's, half the seed's."""
    rng, draw = np.random.default_rng(seed), LOSSES[kind]
    prompts = draw(rng, (num_comparisons, num_prompts))
    seeds = draw(rng, (num_comparisons, num_prompts, SEEDS_PER_PROMPT))
    losses: Floats = np.sqrt(0.5) * (prompts + seeds.mean(axis=-1))
    return losses


def tied(share: float, num_comparisons: int, num_prompts: int, seed: int) -> Floats:
    """Return prompts' losses [comparisons, prompts], equal but for a share of bad ones; their true mean is 0."""
    rng = np.random.default_rng(seed)
    shape = (num_comparisons, num_prompts)
    losses: Floats = (rng.random(shape) < share) * rng.exponential(1.0, shape) - share
    return losses


def main() -> None:
    from scipy.stats import ttest_1samp

    def students(losses: Floats) -> Floats:
        found: Floats = ttest_1samp(losses, 0.0, axis=1, alternative="less").pvalue
        return found

    tests: dict[str, Callable[[Floats], Floats]] = {"t": students, "ours": lambda losses: p_below(losses, 0.0)}
    on_margin: dict[str, Callable[[int, int, int], Floats]] = {kind: partial(simulated, kind) for kind in LOSSES}
    on_margin |= {kind: partial(tied, share) for kind, share in BAD_SHARES.items()}
    sizes = []
    for kind, losses_of in on_margin.items():
        row = {"losses": kind}
        for num_prompts in PROMPTS:
            losses = losses_of(COMPARISONS, num_prompts, num_prompts)
            rates = [1000 * (p_of(losses) <= 0.05).mean() for p_of in tests.values()]
            row[f"{num_prompts}"] = " / ".join(f"{rate:.0f}" for rate in rates)
        sizes.append(row)
    print(markdown(sizes), flush=True)

    needed = []
    for kind in LOSSES:
        pilot = simulated(kind, 1, PILOT, seed=1)[0]
        row = {"losses": kind}
        for margin in MARGINS:
            # a margin in deviations of one clip: those are 1
            stated = clusters_to_pass(pilot - pilot.mean(), margin)
            assert stated is not None
            passes = p_below(simulated(kind, 5000, stated, seed=2), margin) <= 0.05
            row[f"{margin:g}"] = f"{stated} ({passes.mean():.0%})"
        needed.append(row)
    print("\n" + markdown(needed), flush=True)

    coverage = []
    for kind in LOSSES:
        row = {"losses": kind}
        for num_prompts in PROMPTS:
            covered = 0
            for losses in simulated(kind, 1000, num_prompts, seed=3):
                found = mean_interval(losses.tolist(), list(range(num_prompts)), num_resamples=999)
                covered += found.low <= 0.0 <= found.high
            row[f"{num_prompts}"] = f"{covered / 10:.1f} %"
        coverage.append(row)
    print("\n" + markdown(coverage))


if __name__ == "__main__":
    main()
