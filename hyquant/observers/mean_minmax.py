"""Mean extremes: the mean over calls of each call's smallest and largest value.

Narrower than the true extremes when few calls have outliers; values beyond the mean are clamped. msModelSlim calls this
rule minmax.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from hyquant.observers.base import Observer, refuse_multiplier

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
    refuse_multiplier("mean_minmax", mul)
    calls = stats.calls.sum()
    return (stats.sum_lo.sum() / calls).float(), (stats.sum_hi.sum() / calls).float()


MEAN_MINMAX = Observer(name="mean_minmax", choose_range=choose_range, follows_multiplier=False)
