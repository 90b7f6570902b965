"""Mean extremes: the mean over calls of each call's smallest and largest value.

Narrower than the true extremes when few calls have outliers; values beyond the mean are clamped. msModelSlim calls this
rule minmax.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from hyquant.errors import CalibrationError
from hyquant.observers.base import Observer

if TYPE_CHECKING:
    from hyquant.calibration.stats import GroupStats


def choose_range(stats: "GroupStats", mul: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mean over calls of the per-call minimum and maximum.

    Args:
        stats: sum_lo, sum_hi and calls are [T].
        mul: Must be None: which channel held a call's extreme is not remembered.

    Raises:
        CalibrationError: If a multiplier is given.
    """
    if mul is not None:
        raise CalibrationError(
            "mean_minmax of a smoothed layer must come from statistics of the smoothed input, but these are of the "
            "plain one; observe the records again with mul and pass the result as smoothed_stats, or use minmax."
        )
    calls = stats.calls.sum()
    return (stats.sum_lo.sum() / calls).float(), (stats.sum_hi.sum() / calls).float()


MEAN_MINMAX = Observer(name="mean_minmax", choose_range=choose_range, follows_multiplier=False)
