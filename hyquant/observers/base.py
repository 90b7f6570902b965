"""What an observer is: the rule that turns a group's statistics into the range its activations are quantized over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hyquant.calibration.stats import GroupStats

RangeRule = Callable[["GroupStats", Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Observer:
    """An entry of `OBSERVERS`.

    Attributes:
        name: The act_method.
        choose_range: (statistics with at least one step, each with calls; [C] multiplier of the input or None) ->
            (lo, hi) as float32 scalars. It depends on the set of calls only, not on their order or grouping.
        follows_multiplier: Whether the range of the multiplied input follows from statistics of the plain input; if
            not, `choose_range` refuses a multiplier and the input must be observed anew.
    """

    name: str
    choose_range: RangeRule
    follows_multiplier: bool
