"""True extremes or least squares, whichever suits: outliers far beyond the spread are kept, others may be clamped.

    r = max(|lo|, |hi|) / standard deviation          histogram if r <= 50, else minmax

Source: msModelSlim's act_method 3 ("mix"), which takes r from the first five records only.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyquant.calibration.histogram import density
from hyquant.numerics.density import standard_deviation
from hyquant.observers.base import Observer, histogram_for
from hyquant.observers.histogram import HISTOGRAM
from hyquant.observers.minmax import MINMAX

if TYPE_CHECKING:
    from hyquant.calibration.stats import GroupStats

LARGEST_RATIO = 50.0


def choose_range(stats: "GroupStats", mul: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the range of `histogram` or of `minmax`.

    Args:
        stats: lo and hi are [T, C], with a histogram.
        mul: Must be None.

    Raises:
        CalibrationError: If a multiplier is given or there is no histogram.
    """
    spread = standard_deviation(density(histogram_for("mix", stats, mul)))
    absmax = torch.maximum(stats.lo.abs(), stats.hi.abs()).amax().item()
    rule = HISTOGRAM if absmax <= LARGEST_RATIO * spread else MINMAX
    return rule.choose_range(stats, mul)


MIX = Observer(name="mix", choose_range=choose_range, follows_multiplier=False, needs_histogram=True)
