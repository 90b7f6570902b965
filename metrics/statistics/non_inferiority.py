"""Is the mean below a limit? Tests whose size about holds at 16 to 64 prompts where losses are skewed, but not tied.

What a quantized video loses is skewed: most clips lose little, a few lose much. With 32 prompts Student's t then
passes 8 to 16 of 100 models that lie exactly on the margin instead of 5, because a sample that lacks the bad clips by
chance has both a low mean and a small deviation. `p_below` corrects t for skewness by Hall's transformation, takes
the skewness at 1.5 standard errors above its estimate (an estimate from few values is too small), and never rejects
where t would not. docs/evaluation.md has the sizes and what they cost.

What no test can know is damage that no prompt of the sample shows. Flags, which are 0 or 1, are therefore counted with
the binomial law: 32 spotless prompts bound the share of bad ones by 9 %, not by 0. So are prompts that all score the
same, of which t would be certain: `p_below` is then at least `p_unseen`. Where most prompts tie and a few are bad, the
size holds from 64 prompts on if one in ten is bad, and not there if one in twenty is.

    K clusters (prompts)
"""

import numpy as np
from numpy.typing import NDArray

from metrics.statistics.clusters import Floats

SKEWNESS_ERRORS = 1.5
"""How many standard errors are added to the estimated skewness; chosen by simulation, see docs/evaluation.md."""

UNSEEN_SHARE = 0.1
"""Share of bad prompts that prompts without any difference must rule out before they show anything."""

ROUNDING = 1e-6
"""Scores that differ by less are the same: a cosine of a video with itself may differ from 1 by as much."""


def p_below(means_K: Floats, limit: float) -> Floats:
    """Return the p value of "the true mean is at or above the limit"; small values say that it is below.

    With w = (mean - limit) / s and skewness g, the statistic is the larger of sqrt(K) w and
    sqrt(K) (w + g w^2 / 3 + g^2 w^3 / 27 + g / (6 K)), held against Student's t with K - 1 degrees of freedom.

    Args:
        means_K: [..., K] float64, one value per prompt, K >= 3; leading dimensions are separate samples.
        limit: What the mean is held against.

    Returns:
        [...] in [0, 1]. Where nothing varies: `p_unseen` below the limit, else 1.

    Source: Hall, "On the removal of skewness by transformation", Journal of the Royal Statistical Society B 54 (1992).
    """
    p = _tested(means_K, limit)
    return np.where(is_steady(means_K), np.maximum(p, p_unseen(means_K.shape[-1])), p)


def p_above(means_K: Floats, limit: float) -> Floats:
    """Return the p value of "the true mean is at or below the limit"; small values say that it is above.

    What is rare is damage, and it lies above: it does not make a mean look too high by being missed. So where nothing
    varies, this is 0 above the limit, else 1.
    """
    return _tested(-means_K, -limit)


def is_steady(means_K: Floats) -> NDArray[np.bool_]:
    """Say of each sample, [..., K], whether its values are the same but for rounding."""
    steady: NDArray[np.bool_] = np.ptp(means_K, axis=-1) <= ROUNDING
    return steady


def p_unseen(num_clusters: int) -> float:
    """Return how likely so many prompts show no bad one although a share of `UNSEEN_SHARE` is: 0.03 for 32."""
    return p_share_below(0, num_clusters, UNSEEN_SHARE)


def _tested(means_K: Floats, limit: float) -> Floats:
    """Return what Student's t, corrected for skewness, says of "the true mean is at or above the limit"."""
    from scipy.stats import t as student

    num = means_K.shape[-1]
    mean, deviation = means_K.mean(axis=-1), means_K.std(axis=-1, ddof=1)
    varies = np.ptp(means_K, axis=-1) > 0.0
    w = (mean - limit) / np.where(varies, deviation, 1.0)
    g = _skewness(means_K) + SKEWNESS_ERRORS * np.sqrt(6.0 / num)
    corrected = w + g * w**2 / 3 + g**2 * w**3 / 27 + g / (6 * num)
    p: Floats = student.cdf(np.sqrt(num) * np.maximum(w, corrected), num - 1)
    return np.where(varies, p, (mean >= limit).astype(np.float64))


def p_share_below(num_flagged: int, num_clusters: int, limit: float) -> float:
    """Return the exact p value of "the true share of flagged prompts is at or above the limit", by the binomial law."""
    from scipy.stats import binom

    return float(binom.cdf(num_flagged, num_clusters, limit))


def p_share_above(num_flagged: int, num_clusters: int, limit: float) -> float:
    """Return the exact p value of "the true share of flagged prompts is at or below the limit", by the binomial law."""
    from scipy.stats import binom

    return float(binom.sf(num_flagged - 1, num_clusters, limit))


def _skewness(means_K: Floats) -> Floats:
    """Return the adjusted Fisher-Pearson skewness of each sample; 0 where nothing varies."""
    num = means_K.shape[-1]
    centred = means_K - means_K.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1)
    third = (centred**3).mean(axis=-1)
    varies = variance > 0.0
    skewness = np.where(varies, third / np.where(varies, variance, 1.0) ** 1.5, 0.0)
    adjusted: Floats = skewness * np.sqrt(num * (num - 1)) / (num - 2)
    return adjusted
