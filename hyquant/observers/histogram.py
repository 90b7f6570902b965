"""Least squares: the range whose int8 codes lose least of the values, clamping and rounding taken together.

A narrower range rounds finer and clamps more. Every width w has its best place: moving the range by a little must gain
as much at one end as it loses at the other, so the values below it exceed it by as much in sum as those above. Widths
are tried in steps of a twelfth octave, from the true extremes down to 2^-10 of them, and finer around the best; for
each the mean squared error of the int8 codes, zero point included, is integrated over the histogram
(`hyquant.numerics.density`). Nothing is drawn at random and the search has no start value.

Source: the criterion, clamping plus rounding distortion, is that of Banner et al., arXiv:1810.05723, section 3, there
for known distributions; torch.ao's HistogramObserver minimizes it by a greedy walk over quantiles.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyquant.calibration.histogram import density
from hyquant.numerics.density import Density, mean_squared_error, sums_below
from hyquant.numerics.qparams import QParams
from hyquant.observers.base import Observer, histogram_for

if TYPE_CHECKING:
    from hyquant.calibration.stats import GroupStats

_OCTAVES = 10
_PER_OCTAVE = 12
_FINER = 8


def choose_range(stats: "GroupStats", mul: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the range with the least mean squared error of asymmetric int8 codes.

    Args:
        stats: lo and hi are [T, C], with a histogram.
        mul: Must be None.

    Raises:
        CalibrationError: If a multiplier is given or there is no histogram.
    """
    seen = density(histogram_for("histogram", stats, mul))
    lo, hi = stats.lo.amin(), stats.hi.amax()
    best_lo, best_hi = least_squares_range(seen, lo.item(), hi.item())
    return lo.clamp(min=best_lo), hi.clamp(max=best_hi)


def least_squares_range(seen: Density, lo: float, hi: float) -> tuple[float, float]:
    """Return the range around 0 with the least mean squared error of asymmetric int8 codes.

    Args:
        seen: The values.
        lo: Smallest value.
        hi: Largest value.

    Returns:
        lo' <= 0 <= hi' within [min(lo, 0), max(hi, 0)].
    """
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if lo == hi:
        return lo, hi
    octaves = -torch.arange(_OCTAVES * _PER_OCTAVE + 1, dtype=torch.float64) / _PER_OCTAVE
    widths = (hi - lo) * torch.exp2(octaves)
    best = int(_errors(seen, _places(seen, widths, lo, hi), widths).argmin())
    finer = torch.arange(-_FINER, _FINER + 1, dtype=torch.float64) / (_FINER * _PER_OCTAVE)
    widths = (widths[best] * torch.exp2(finer)).clamp(max=hi - lo).repeat_interleave(3)
    begins = _places(seen, widths, lo, hi) + torch.tensor([0.0, -1.0, 1.0]).repeat(len(finer)) * widths / 255
    begins = _within(begins, widths, lo, hi)
    best = int(_errors(seen, begins, widths).argmin())
    return begins[best].item(), (begins[best] + widths[best]).item()


def _places(seen: Density, widths: Tensor, lo: float, hi: float) -> Tensor:
    """Return for each width the beginning of the range with equal sums of what lies below and above it.

    The difference of the sums grows with the beginning, so halving finds it; a fraction of a step suffices.
    """
    lowest, highest = (_within(torch.full_like(widths, bound), widths, lo, hi) for bound in (lo, 0.0))
    num_values = seen.counts.sum().item()
    total = torch.dot(seen.counts, (seen.edges[1:] + seen.edges[:-1]) / 2).item()
    below_limit = sums_below(seen)
    for _ in range(math.ceil(math.log2(255 * 8))):
        begin = (lowest + highest) / 2
        end = begin + widths
        below, below_end = below_limit(torch.stack((begin, end)))
        above = below_end - (num_values * end - total)  # sum of max(x - end, 0)
        is_too_high = below > above
        lowest, highest = torch.where(is_too_high, lowest, begin), torch.where(is_too_high, begin, highest)
    return (lowest + highest) / 2


def _within(begins: Tensor, widths: Tensor, lo: float, hi: float) -> Tensor:
    """Move ranges so that they contain 0 and stay between lo and hi."""
    return begins.clamp(min=lo).minimum(hi - widths).clamp(max=0).maximum(-widths).clamp(min=lo)


def _errors(seen: Density, begins: Tensor, widths: Tensor) -> Tensor:
    scale = widths / 255
    return mean_squared_error(seen, QParams(scale, (-128 - torch.round(begins / scale)).clamp(-128, 127)))


HISTOGRAM = Observer(name="histogram", choose_range=choose_range, follows_multiplier=False, needs_histogram=True)
