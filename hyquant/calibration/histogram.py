"""Integer histograms of activations that merge without loss.

Bins are [i 2^e, (i + 1) 2^e) for consecutive integers i: their widths are powers of two and 0 is an edge. A bin of a
coarser grid is then a pair of bins of a finer one, so two histograms always have a common grid, and bringing them to it
moves counts and splits none. e is the smallest exponent with which the values fit into 2048 bins. A histogram is
therefore a function of the set of values: the same bits, however the values were cut into calls, records and ranks and
in whatever order those were merged.

Values are counted where they are and the counts are kept on the CPU.

T steps   B = 2048 bins   R histograms to join
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hyquant.numerics.density import Density

NUM_BINS = 2048

_EXPONENTS = range(-126, 128)  # 2^e and 2^-e are normal float32 numbers, and e = 118 fits whatever float32 holds
_MAX_INDEX = 2**24  # bins finer than float32's 24 bits tell no two values apart
_CHUNK = 2**22  # elements counted at a time, to bound temporary memory


@dataclass(frozen=True)
class Histogram:
    """Counts of values per step; a step without values holds the smallest exponent and zeros.

    Attributes:
        exponent: [T] int64, e; a bin is 2^e wide.
        first: [T] int64, index of the bin that holds the smallest value; it begins at first * 2^e.
        counts: [T, 2048] int64, values in bins first, first + 1, ...
    """

    exponent: Tensor
    first: Tensor
    counts: Tensor

    @property
    def num_steps(self) -> int:
        """Return the number of steps T."""
        return int(self.counts.shape[0])


def empty_histogram(num_steps: int) -> Histogram:
    """Return the neutral element of `merge_histograms`: steps without values."""
    return Histogram(
        exponent=torch.full((num_steps,), _EXPONENTS[0]),
        first=torch.zeros(num_steps, dtype=torch.int64),
        counts=torch.zeros(num_steps, NUM_BINS, dtype=torch.int64),
    )


def histogram_of(x: Tensor) -> Histogram:
    """Count the values of a tensor, as T = 1; none are counted unless all are finite.

    Args:
        x: Any shape with at least one element; bfloat16, float16 or float32.
    """
    lo, hi = (bound.item() for bound in torch.aminmax(x))
    if not (math.isfinite(lo) and math.isfinite(hi)):
        return empty_histogram(1)
    exponent = _EXPONENTS[bisect_left(_EXPONENTS, True, key=lambda e: _fits(lo, hi, e))]
    first = math.floor(math.ldexp(lo, -exponent))
    counts = torch.zeros(NUM_BINS, dtype=torch.int64, device=x.device)
    for part in torch.split(x.reshape(-1), _CHUNK):
        counts += torch.bincount((_bin_index(part.float(), exponent) - first).int(), minlength=NUM_BINS)
    return Histogram(torch.tensor([exponent]), torch.tensor([first]), counts[None].cpu())


def merge_histograms(a: Histogram, b: Histogram) -> Histogram:
    """Join the histograms of two disjoint sets of values, step by step.

    Raises:
        ValueError: If the numbers of steps differ.
    """
    if a.num_steps != b.num_steps:
        raise ValueError(f"merged histograms must have equal steps, but got {a.num_steps} and {b.num_steps}.")
    return _joined(*(torch.stack(pair) for pair in zip(_tensors(a), _tensors(b), strict=True)))


def join_steps(histogram: Histogram) -> Histogram:
    """Return the histogram of the values of all steps, as T = 1."""
    return _joined(*(tensor[:, None] for tensor in _tensors(histogram)))


def concatenate_steps(parts: Sequence[Histogram]) -> Histogram:
    """Put tables one after the other."""
    return Histogram(*(torch.cat(column) for column in zip(*map(_tensors, parts), strict=True)))


def pick_steps(histogram: Histogram, wanted: Tensor) -> Histogram:
    """Return some steps.

    Args:
        histogram: Of T steps.
        wanted: [T] bool.
    """
    return Histogram(*(tensor[wanted.cpu()] for tensor in _tensors(histogram)))


def density(histogram: Histogram) -> Density:
    """Return the distribution of the values of all steps, from the first to the last bin that holds one."""
    joined = join_steps(histogram)
    width = 2.0 ** int(joined.exponent)
    num_bins = int(joined.counts[0].nonzero().amax()) + 1
    edges = (int(joined.first) + torch.arange(num_bins + 1, dtype=torch.float64)) * width
    return Density(edges=edges, counts=joined.counts[0, :num_bins].double())


def _fits(lo: float, hi: float, exponent: int) -> bool:
    """Say whether all values between lo and hi have a bin; if so, they have one with every larger exponent too."""
    first, last = (math.floor(math.ldexp(bound, -exponent)) for bound in (lo, hi))
    return last - first < NUM_BINS and first >= -_MAX_INDEX and last < _MAX_INDEX


def _bin_index(x: Tensor, exponent: int) -> Tensor:
    """Return floor(x / 2^exponent), exactly, in float32.

    A power of two changes no digit, unless the product leaves the normal numbers, as that of a tiny x with a small
    factor would. Rounding down first prevents it: floor(x / 2^e) = floor(floor(x) / 2^e) for e >= 0.
    """
    return torch.floor((torch.floor(x) if exponent > 0 else x) * 2.0**-exponent)


def _joined(exponent_RT: Tensor, first_RT: Tensor, counts_RTB: Tensor) -> Histogram:
    """Join histograms over R: bring all to the coarsest grid, halve that until the union fits, add."""
    bins = torch.arange(NUM_BINS)
    last_RT = first_RT + torch.where(counts_RTB > 0, bins, 0).amax(dim=2)
    is_empty_RT = counts_RTB.sum(dim=2) == 0
    exponent_T = exponent_RT.amax(dim=0)
    shift_RT = (exponent_T - exponent_RT).clamp(max=62)  # of indices below 2^25, of which 62 bits leave the sign
    first_T = (first_RT >> shift_RT).masked_fill(is_empty_RT, _MAX_INDEX).amin(dim=0)
    last_T = (last_RT >> shift_RT).masked_fill(is_empty_RT, -_MAX_INDEX).amax(dim=0)
    halvings = torch.arange(_MAX_INDEX.bit_length())[:, None]  # what is too wide becomes narrow enough within these
    extra_T = ((last_T >> halvings) - (first_T >> halvings) >= NUM_BINS).sum(dim=0)
    first_T = torch.where(is_empty_RT.all(dim=0), 0, first_T >> extra_T)
    index_RTB = (first_RT[..., None] + bins) >> (shift_RT + extra_T).clamp(max=62)[..., None]
    place_RTB = (index_RTB - first_T[:, None]).clamp(0, NUM_BINS - 1)  # moves empty bins only
    counts_TB = torch.zeros_like(counts_RTB[0])
    for place_TB, counts in zip(place_RTB, counts_RTB, strict=True):
        counts_TB.scatter_add_(1, place_TB, counts)
    return Histogram(exponent=exponent_T + extra_T, first=first_T, counts=counts_TB)


def _tensors(histogram: Histogram) -> tuple[Tensor, ...]:
    return tuple(getattr(histogram, each.name) for each in fields(Histogram))
