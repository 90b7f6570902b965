"""Values of one prompt belong together: two seeds of it resemble each other more than two prompts do.

The mean over prompts of the means within them is what every interval and test here is about. The prompts are then the
observations: independent of each other, however many seeds each has.

    P values   K clusters (prompts)
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from metrics.errors import MetricError

Floats = NDArray[np.float64]


def cluster_means(values: Sequence[float], clusters: Sequence[Hashable]) -> Floats:
    """Return the mean within each cluster, [K] float64, in the order in which clusters first appear.

    Args:
        values: [P], one per pair of prompt and seed; finite.
        clusters: [P], which prompt each belongs to.

    Raises:
        MetricError: If the two differ in length, are empty, or a value is not finite.
    """
    values_P = np.asarray(values, dtype=np.float64)
    if len(values_P) != len(clusters) or len(values_P) == 0:
        raise MetricError(
            f"every value must have its cluster, and there must be some, but got {len(values_P)} values and "
            f"{len(clusters)} clusters; give one cluster per value"
        )
    if not np.isfinite(values_P).all():
        raise MetricError(
            f"values must be finite to be averaged, but {int((~np.isfinite(values_P)).sum())} of {len(values_P)} are "
            "not; look at the videos they come from"
        )
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    index_P = np.array([numbers[cluster] for cluster in clusters])
    means_K: Floats = np.bincount(index_P, weights=values_P) / np.bincount(index_P)
    return means_K
