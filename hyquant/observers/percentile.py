"""Narrowing a range to the central share of all values, whatever rule chose it."""

from typing import TYPE_CHECKING

from torch import Tensor

from hyquant.calibration.histogram import density
from hyquant.numerics.density import central_interval
from hyquant.observers.base import histogram_for

if TYPE_CHECKING:
    from hyquant.calibration.stats import GroupStats


def narrowed(
    bounds: tuple[Tensor, Tensor], stats: "GroupStats", mul: Tensor | None, percentile: float
) -> tuple[Tensor, Tensor]:
    """Limit both bounds of a range to the interval that holds a share of all values, half of the rest at either end.

    Args:
        bounds: lo and hi, float32 scalars.
        stats: Statistics with a histogram.
        mul: Must be None.
        percentile: The share, in (0.5, 1).

    Raises:
        CalibrationError: If a multiplier is given or there is no histogram.
    """
    begin, end = central_interval(density(histogram_for("percentile", stats, mul)), percentile)
    lo, hi = bounds
    return lo.clamp(begin, end), hi.clamp(begin, end)
