"""What can be known of values whose counts per bin are known: they are taken to be spread evenly within each bin.

    edges u_0 < u_1 < ... < u_B, equally far apart      counts n_j of the values in [u_j, u_(j+1))

The squared error of int8 is integrated over such a density exactly. With y = x / s + z and k = clamp(round(y), -128,
127), the error of x is s (y - k), and

    G(y) = s^2 (k / 12 + (y - k)^3 / 3)

is an antiderivative of its square over y: a whole step adds s^2 / 12, and beyond the last codes the cubic goes on, so
rounding and clamping are one formula.

B bins   K quantizations that are compared
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hyquant.numerics.qparams import QParams


class Density(NamedTuple):
    """Counts per bin. edges: [B + 1] float64, equally far apart; counts: [B] float64, whole numbers, not all 0."""

    edges: Tensor
    counts: Tensor


def standard_deviation(density: Density) -> float:
    """Return the standard deviation, not below the one of values spread over one bin."""
    edges, counts = density
    width = (edges[1] - edges[0]).item()
    centres = (edges[1:] + edges[:-1]) / 2
    mean = torch.dot(centres, counts) / counts.sum()
    variance = torch.dot((centres - mean).square(), counts) / counts.sum()
    return float((variance + width**2 / 12).sqrt())


def central_interval(density: Density, share: float) -> tuple[float, float]:
    """Return the interval that holds a share of all values, half of the rest on either side.

    Args:
        density: The values.
        share: In (0, 1).
    """
    tail = (1 - share) / 2
    return quantile(density, tail), quantile(density, 1 - tail)


def quantile(density: Density, share: float) -> float:
    """Return the smallest number with a share of the values below it, 0 < share < 1."""
    edges, counts = density
    below = torch.cat((counts.new_zeros(1), counts.cumsum(0))) / counts.sum()
    after = int(torch.searchsorted(below, share))
    within = (share - below[after - 1]) / (below[after] - below[after - 1])
    return float(edges[after - 1] + within * (edges[after] - edges[after - 1]))


def sums_below(density: Density) -> Callable[[Tensor], Tensor]:
    """Return the function that gives, for limits a, the sums over all values x of max(a - x, 0).

    It takes float64 of any shape and returns the same: a quadratic within each bin, 0 left of all values, and a line
    right of them.
    """
    edges, counts = density
    begin, width = edges[0].item(), (edges[1] - edges[0]).item()
    below = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    sums = torch.cat((counts.new_zeros(1), ((below[1:] + below[:-1]) / 2).cumsum(0)))
    bends = torch.cat((counts, counts.new_zeros(1))) / 2

    def at(limits: Tensor) -> Tensor:
        position = ((limits - begin) / width).clamp_(min=0)
        index = position.floor().clamp_(max=len(counts))
        inside, index = position - index, index.long()
        return (sums[index] + (below[index] + bends[index] * inside) * inside) * width

    return at


def mean_squared_error(density: Density, qparams: QParams) -> Tensor:
    """Return the mean squared error of the values under int8 quantizations.

    Args:
        density: The values.
        qparams: Scale and zero point, [K] float64 each.

    Returns:
        [K] float64.
    """
    edges, counts = density
    scale, zero_point = qparams.scale[:, None], qparams.zero_point[:, None]
    y = edges / scale + zero_point
    code = y.round().clamp_(-128, 127)
    integral = (y - code).pow_(3).div_(3).add_(code, alpha=1 / 12)
    per_width = counts / (counts.sum() * (edges[1] - edges[0]))
    # Summed by parts: sum over bins of per_width * (G at its end - G at its beginning).
    steps = torch.nn.functional.pad(per_width, (1, 0)) - torch.nn.functional.pad(per_width, (0, 1))
    return (integral * steps).sum(dim=1) * qparams.scale.pow(3)
