"""How many prompts does a test need? Answered by resampling the prompts at hand, so that their skewness counts.

K clusters (prompts) at hand   N clusters of a planned sample
"""

import numpy as np

from metrics.statistics.clusters import Floats
from metrics.statistics.non_inferiority import p_below

POWER = 0.8
NUM_DRAWS = 2000
MAX_CLUSTERS = 1024
MAX_COUNTED = 2**14
MIN_CLUSTERS = 3
"""Below three values there is no skewness."""


def power_below(means_K: Floats, limit: float, num_clusters: int, *, alpha: float, seed: int = 0) -> float:
    """Return how often `p_below` of so many prompts is at most alpha, if all prompts are like the ones at hand.

    Args:
        means_K: [K] float64, one value per prompt.
        limit: What the mean is held against.
        num_clusters: Prompts of a planned sample.
        alpha: Error rate of the test.
        seed: Seed of the resampling.
    """
    index_DN = np.random.default_rng(seed).integers(0, len(means_K), (NUM_DRAWS, num_clusters))
    return float((p_below(means_K[index_DN], limit) <= alpha).mean())


def clusters_to_pass(
    means_K: Floats,
    limit: float,
    *,
    at_least: int = MIN_CLUSTERS,
    alpha: float = 0.05,
    power: float = POWER,
    seed: int = 0,
) -> int | None:
    """Return from which number of prompts on the mean is shown to be below the limit with some power.

    Power need not grow with the number: a sample that is too small to hold one of the few bad prompts passes for
    looking spotless. Where some prompts were not enough, say so with `at_least`.

    Args:
        means_K: [K] float64, one value per prompt; what all prompts are taken to be like.
        limit: What the mean is held against.
        at_least: The smallest number to be considered.
        alpha: Error rate of the test.
        power: How often it must succeed.
        seed: Seed of the resampling.

    Returns:
        At least `at_least`; None if `MAX_CLUSTERS` are too few, as for a mean at or above the limit.
    """

    def is_enough(num_clusters: int) -> bool:
        return power_below(means_K, limit, num_clusters, alpha=alpha, seed=seed) >= power

    if means_K.mean() >= limit:
        return None
    low, high = at_least, at_least
    while not is_enough(high):
        if high >= MAX_CLUSTERS:
            return None
        low, high = high + 1, min(2 * high, MAX_CLUSTERS)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return high


def clusters_to_pass_share(
    share: float, limit: float, *, at_least: int = MIN_CLUSTERS, alpha: float = 0.05, power: float = POWER
) -> int | None:
    """Return the smallest number of prompts at which a share of flagged ones is shown to be below a limit.

    Of n prompts the test passes with at most k flagged ones, the largest k with P(flagged <= k; n, limit) <= alpha; n
    is enough if P(flagged <= k; n, share) >= power, by the binomial law.

    Args:
        share: The true share of flagged prompts, in [0, 1].
        limit: What it is held against, in (0, 1).
        at_least: The smallest number to be considered.
        alpha: Error rate of the test.
        power: How often it must succeed.

    Returns:
        At least `at_least`; None if `MAX_COUNTED` are too few, as for a share at or above the limit.
    """
    from scipy.stats import binom

    num_N = np.arange(at_least, MAX_COUNTED + 1)
    most_N = binom.ppf(alpha, num_N, limit)
    most_N = np.where(binom.cdf(most_N, num_N, limit) <= alpha, most_N, most_N - 1)
    is_enough_N = binom.cdf(most_N, num_N, share) >= power
    return int(num_N[is_enough_N][0]) if share < limit and is_enough_N.any() else None
