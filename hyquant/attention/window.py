"""The narrowest interval that holds a given share of some values.

Of n values, sorted, m = floor(n * ratio) are kept. There are n - m + 1 intervals from one sorted value to the one m - 1
places above it; the narrowest is chosen, the lowest of equally narrow ones. Only the n - m + 1 smallest and largest
values can be bounds, so nothing else is sorted.

Source: msModelSlim 26.1.0, the range of its attention quantizer ("recall window"), rederived from its results.
"""

import math

import torch
from torch import Tensor


def narrowest_window(values: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Return the bounds of the narrowest interval that contains floor(n * ratio) of the values.

    Args:
        values: [n] of any float dtype, n >= 1; widths are compared in float32.
        ratio: Share to keep, in (0, 1]; at least one value is kept. 1 gives the extremes.

    Returns:
        Two float32 scalars, lo <= hi; not finite if any value, kept or not, is not finite.
    """
    values = values.float()
    num_dropped = values.numel() - max(1, math.floor(values.numel() * ratio))
    if num_dropped == 0:
        lo, hi = torch.aminmax(values)
        return lo, hi
    lows = torch.topk(values, num_dropped + 1, largest=False).values
    highs = torch.topk(values, num_dropped + 1).values.flip(0)
    best = torch.argmin(highs - lows)  # the first of equals
    return _unless_broken(lows[best], lows[0]), _unless_broken(highs[best], highs[-1])


def _unless_broken(bound: Tensor, extreme: Tensor) -> Tensor:
    """Return the bound, or the extreme value if that is inf or nan, so that a dropped one does not go unseen."""
    return torch.where(torch.isfinite(extreme), bound, extreme)
