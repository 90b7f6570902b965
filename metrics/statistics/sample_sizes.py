"""How many prompts does a test need? Answered by resampling the prompts at hand, so that their skewness counts.

K clusters (prompts) at hand   N clusters of a planned sample
"""

import math

import numpy as np

from metrics.statistics.clusters import Floats
from metrics.statistics.non_inferiority import p_below

POWER = 0.8
NUM_DRAWS = 2000
MAX_CLUSTERS = 1024
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
    means_K: Floats, limit: float, *, alpha: float = 0.05, power: float = POWER, seed: int = 0
) -> int | None:
    """Return the smallest number of prompts at which the mean is shown to be below the limit with some power.

    Args:
        means_K: [K] float64, one value per prompt; what all prompts are taken to be like.
        limit: What the mean is held against.
        alpha: Error rate of the test.
        power: How often it must succeed.
        seed: Seed of the resampling.

    Returns:
        At least `MIN_CLUSTERS`; None if `MAX_CLUSTERS` are too few, as for a mean at or above the limit.
    """

    def is_enough(num_clusters: int) -> bool:
        return power_below(means_K, limit, num_clusters, alpha=alpha, seed=seed) >= power

    if means_K.mean() >= limit:
        return None
    low, high = MIN_CLUSTERS, MIN_CLUSTERS
    while not is_enough(high):
        if high >= MAX_CLUSTERS:
            return None
        low, high = high + 1, min(2 * high, MAX_CLUSTERS)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return high


def spotless_clusters_to_pass(limit: float, *, alpha: float = 0.05) -> int:
    """Return how many prompts without a flag show that the share of flagged ones is below a limit in (0, 1)."""
    return math.ceil(math.log(alpha) / math.log1p(-limit))
