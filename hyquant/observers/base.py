"""What an observer is: the rule that turns a group's statistics into the range its activations are quantized over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hyquant.calibration.histogram import Histogram
from hyquant.errors import CalibrationError

if TYPE_CHECKING:
    from hyquant.calibration.stats import GroupStats

RangeRule = Callable[["GroupStats", Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Observer:
    """An entry of `OBSERVERS`.

    Attributes:
        name: The act_method.
        choose_range: (statistics with at least one step, each with calls; [C] multiplier of the input or None) ->
            (lo, hi) as float32 scalars within the true extremes. It depends on the set of calls only, not on their
            order or grouping.
        follows_multiplier: Whether the range of the multiplied input follows from statistics of the plain input; if
            not, `choose_range` refuses a multiplier and the input must be observed anew.
        needs_histogram: Whether statistics must have been gathered with histograms.
    """

    name: str
    choose_range: RangeRule
    follows_multiplier: bool
    needs_histogram: bool = False


def refuse_multiplier(rule: str, mul: Tensor | None) -> None:
    """Raise CalibrationError if a rule that cannot follow a multiplier is given one."""
    if mul is not None:
        raise CalibrationError(
            f"{rule} of a smoothed layer must come from statistics of the smoothed input, but these are of the "
            "plain one; observe the records again with mul and pass the result as smoothed_stats, or use minmax."
        )


def histogram_for(rule: str, stats: "GroupStats", mul: Tensor | None) -> Histogram:
    """Return the histogram that a rule works on.

    Raises:
        CalibrationError: If a multiplier is given (a histogram does not know channels) or there is no histogram.
    """
    refuse_multiplier(rule, mul)
    if stats.histogram is None:
        raise CalibrationError(
            f"{rule} must have a histogram of the values, but none was gathered; observe with histograms=True."
        )
    return stats.histogram
