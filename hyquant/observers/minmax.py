"""True extremes: the smallest and the largest value over all calls and channels."""

from typing import TYPE_CHECKING

from torch import Tensor

from hyquant.observers.base import Observer

if TYPE_CHECKING:
    from hyquant.calibration.stats import GroupStats


def choose_range(stats: "GroupStats", mul: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the extremes of x * mul, exactly: mul > 0, so each channel's extremes are multiplied by it.

    Args:
        stats: lo and hi are [T, C].
        mul: [C] float32 > 0, or None.
    """
    lo_TC, hi_TC = (stats.lo, stats.hi) if mul is None else (stats.lo * mul, stats.hi * mul)
    return lo_TC.amin(), hi_TC.amax()


MINMAX = Observer(name="minmax", choose_range=choose_range, follows_multiplier=True)
