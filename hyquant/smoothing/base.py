"""What a smoothing is: a formula for the smoothing scale, a search for it, or both.

A search is a generator. It yields a `Question`, which one pass over all calibration records answers, gets the answer
sent back, may ask again, and returns the scale. So a search says what it needs to know and in which order, and neither
how records are replayed nor over how many ranks: answers are sums, and sums merge.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

TIE = 1e-9
"""Losses this close, relative to the least, are equal: far above what the order of float64 sums changes."""


@dataclass(frozen=True)
class UnitFacts:
    """What is known of the groups that share one smoothing scale before anything is searched.

    Attributes:
        act_absmax: [C] float32, largest |activation| per input channel over all groups and calibration calls.
        weight_absmax: [C] float32, largest |weight| per input channel over all groups and their members.
        ranges: Smallest and largest activation per input channel, both [C] float32, by group name.
    """

    act_absmax: Tensor
    weight_absmax: Tensor
    ranges: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Question:
    """What to sum over all denoiser calls, and over the groups of the unit.

    Attributes:
        size: Length of the answer.
        measure: (group name, its input [M, C] float32, its stacked weight [N, C] float32) -> [size] float64.
    """

    size: int
    measure: Callable[[str, Tensor, Tensor], Tensor]


ScaleSearch = Generator[Question, Tensor, Tensor]
"""Yields questions, is sent their answers ([size] float64), returns a smoothing scale [C] float32."""


@dataclass(frozen=True)
class SmoothingRule:
    """An entry of `SMOOTHINGS`.

    Attributes:
        is_searched: Whether a configuration of this kind needs `search`.
        choose_scale: (configuration, facts) -> [C] float32 > 0, where nothing is searched.
        search: (configuration, facts) -> a search for the scale; None if nothing ever is.
    """

    is_searched: Callable[[Any], bool]
    choose_scale: Callable[[Any, UnitFacts], Tensor] | None = None
    search: Callable[[Any, UnitFacts], ScaleSearch] | None = None


def first_minimum(losses: Tensor) -> int:
    """Return the index of the least of some losses, the first among ties.

    Args:
        losses: [P] float64, finite.
    """
    return int(_minima(losses)[0])


def last_minimum(losses: Tensor) -> int:
    """Return the index of the least of some losses, the last among ties; see `first_minimum`."""
    return int(_minima(losses)[-1])


def _minima(losses: Tensor) -> Tensor:
    return (losses <= losses.amin() * (1 + TIE)).nonzero().flatten()
