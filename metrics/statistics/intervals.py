"""How far is a mean over a few prompts from the mean over all of them? A bootstrap interval, clustered by prompt."""

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from metrics.statistics.clusters import cluster_means

NUM_RESAMPLES = 9999
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that covers the true one in `level` of all cases."""

    mean: float
    low: float
    high: float
    level: float


def mean_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the mean over clusters with its BCa bootstrap interval; clusters are resampled whole.

    Resampled means of a few values vary too little; the level is raised so that intervals of normal values are as wide
    as Student's.

    Of a single cluster, or of clusters with one mean, the interval is that mean: nothing varies. So it is where BCa has
    no finite ends. Of two it is the two: resampling knows nothing beyond them.

    Args:
        values: [P], one per pair of prompt and seed; finite.
        clusters: [P], which prompt each belongs to.
        level: Share of cases the interval is to cover, in (0, 1).
        num_resamples: How many bootstrap means to draw.
        seed: Seed of the draws.

    Raises:
        MetricError: If values are not finite or have no clusters.

    Source: Efron, "Better bootstrap confidence intervals", Journal of the American Statistical Association 82 (1987);
    Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69 (2015), on expanded
    percentiles.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap  # takes half a second to import

    means_K = cluster_means(values, clusters)
    mean = float(means_K.mean())
    if np.ptp(means_K) <= _ROUNDING * max(1.0, abs(mean)):
        return Interval(mean=mean, low=mean, high=mean, level=level)
    if len(means_K) == 2:
        return Interval(mean=mean, low=float(means_K.min()), high=float(means_K.max()), level=level)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # ends that are not finite are looked for below
        drawn = bootstrap(
            (means_K,),
            np.mean,
            n_resamples=num_resamples,
            confidence_level=_expanded(level, len(means_K)),
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(drawn.low), float(drawn.high)
    if not (math.isfinite(low) and math.isfinite(high)):
        return Interval(mean=mean, low=mean, high=mean, level=level)
    return Interval(mean=mean, low=low, high=high, level=level)


def _expanded(level: float, num: int) -> float:
    """Return the level whose normal quantile is sqrt(n / (n - 1)) times Student's quantile of the wanted one."""
    from scipy.stats import norm, t

    quantile = math.sqrt(num / (num - 1)) * t.ppf((1.0 + level) / 2.0, num - 1)
    return float(2.0 * norm.cdf(quantile) - 1.0)
