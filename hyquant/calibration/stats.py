"""What calibration remembers of each layer group's input, per denoising step.

A `GroupStats` is a monoid: `call_stats` makes the statistics of one denoiser call, `merge` joins two (associative and
commutative, so calls, records and ranks may be joined in any order), and how each field merges is declared beside it.
Observers (`hyquant.observers`) choose a range from these statistics; nothing here depends on a configuration.

T steps   C input channels of the group
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TypeAlias

import torch
from torch import Tensor

from hyquant.calibration.histogram import (
    Histogram,
    concatenate_steps,
    empty_histogram,
    histogram_of,
    merge_histograms,
    pick_steps,
)
from hyquant.config import ActMethod
from hyquant.errors import CalibrationError
from hyquant.observers import OBSERVERS
from hyquant.observers.percentile import narrowed


@dataclass(frozen=True)
class GroupStats:
    """Statistics of one layer group's input; a step without calls holds +inf, -inf and zeros.

    Attributes:
        lo: [T, C] float32, smallest value per step and input channel.
        hi: [T, C] float32, largest value per step and input channel.
        sum_lo: [T] float64, sum over calls of the smallest value of the whole call.
        sum_hi: [T] float64, sum over calls of the largest value of the whole call.
        calls: [T] int64, number of calls.
        histogram: How often values occur, over T steps; None unless it was asked for, as it costs 16 KiB per step.
    """

    lo: Tensor = field(metadata={"merge": torch.minimum, "empty": float("inf")})
    hi: Tensor = field(metadata={"merge": torch.maximum, "empty": float("-inf")})
    sum_lo: Tensor = field(metadata={"merge": torch.add, "empty": 0})
    sum_hi: Tensor = field(metadata={"merge": torch.add, "empty": 0})
    calls: Tensor = field(metadata={"merge": torch.add, "empty": 0})
    histogram: Histogram | None = None

    @property
    def num_steps(self) -> int:
        """Return the number of steps T that the tensors have rows for."""
        return int(self.calls.shape[0])


Stats: TypeAlias = dict[str, GroupStats]
"""Statistics by canonical group name."""

Steps: TypeAlias = int | range | None
"""Which steps a range is for: one, several, or all that have calls."""

TENSOR_FIELDS = tuple(each for each in fields(GroupStats) if "merge" in each.metadata)
"""The fields of `GroupStats` that merge element by element."""


def call_stats(x: Tensor, *, histogram: bool = False) -> GroupStats:
    """Return the statistics of one call, as T = 1.

    Args:
        x: [..., C], the input of a layer group in one denoiser call; at least one row.
        histogram: Whether to count the values too.
    """
    rows = x.reshape(-1, x.shape[-1])
    lo_C, hi_C = torch.amin(rows, dim=0).float(), torch.amax(rows, dim=0).float()
    return GroupStats(
        lo=lo_C[None],
        hi=hi_C[None],
        sum_lo=lo_C.amin()[None].double(),
        sum_hi=hi_C.amax()[None].double(),
        calls=torch.ones(1, dtype=torch.int64, device=x.device),
        histogram=histogram_of(x) if histogram else None,
    )


def merge(a: GroupStats, b: GroupStats) -> GroupStats:
    """Join the statistics of two disjoint sets of calls; the shorter one is extended by steps without calls.

    Raises:
        ValueError: If the numbers of input channels differ, or only one of the two has a histogram.
    """
    if a.lo.shape[1] != b.lo.shape[1]:
        raise ValueError(f"merged statistics must have equal channels, but got {a.lo.shape[1]} and {b.lo.shape[1]}.")
    num_steps = max(a.num_steps, b.num_steps)
    joined: dict[str, Tensor] = {}
    for each in TENSOR_FIELDS:
        left, right = (_padded(getattr(s, each.name), num_steps, each.metadata["empty"]) for s in (a, b))
        joined[each.name] = each.metadata["merge"](left, right)
    return GroupStats(**joined, histogram=_merged_counts(a.histogram, b.histogram, num_steps))


def stack_steps(steps: Mapping[int, GroupStats]) -> GroupStats:
    """Put statistics of single steps (T = 1 each) into one table; steps in between that are missing have no calls."""
    table: dict[str, Tensor] = {}
    for each in TENSOR_FIELDS:
        rows = {step_index: getattr(stats, each.name) for step_index, stats in steps.items()}
        blank = torch.full_like(next(iter(rows.values())), each.metadata["empty"])
        table[each.name] = torch.cat([rows.get(step_index, blank) for step_index in range(max(rows) + 1)])
    counts = {step_index: stats.histogram for step_index, stats in steps.items() if stats.histogram is not None}
    rows_of_counts = [counts.get(step_index, empty_histogram(1)) for step_index in range(max(steps) + 1)]
    return GroupStats(**table, histogram=concatenate_steps(rows_of_counts) if counts else None)


def select_steps(stats: GroupStats, steps: Steps) -> GroupStats:
    """Return the statistics of those of the asked steps that have calls.

    Raises:
        CalibrationError: If none of them has.
    """
    wanted = stats.calls > 0
    if steps is not None:
        asked = range(steps, steps + 1) if isinstance(steps, int) else steps
        index = torch.arange(stats.num_steps, device=wanted.device)
        wanted = wanted & (index >= asked.start) & (index < asked.stop)
    if not bool(wanted.any()):
        raise CalibrationError(
            f"calibration must have records of {_spelled(steps)}, but it has {int(stats.calls.sum())} calls over "
            f"{stats.num_steps} steps and none there; capture records of every denoising step."
        )
    rows = {each.name: getattr(stats, each.name)[wanted] for each in TENSOR_FIELDS}
    return GroupStats(**rows, histogram=None if stats.histogram is None else pick_steps(stats.histogram, wanted))


def act_range(
    stats: GroupStats,
    act_method: ActMethod,
    steps: Steps = None,
    mul: Tensor | None = None,
    *,
    percentile: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the activation range that a method chooses.

    Args:
        stats: Statistics of the group.
        act_method: Key of `OBSERVERS`.
        steps: The steps to look at together; None joins all.
        mul: [C] float32 > 0, what the input is multiplied by before it is quantized; None for unsmoothed groups or
            when `stats` were observed with it already.
        percentile: Share of all values, in (0.5, 1), to whose central interval the range is narrowed; None leaves it.

    Returns:
        Two float32 scalars, lo <= hi.

    Raises:
        CalibrationError: If the steps have no records, values are not finite, a histogram is needed and missing, or the
            range of the multiplied input cannot be derived from these statistics.
    """
    seen = select_steps(stats, steps)
    lo, hi = OBSERVERS["minmax"].choose_range(seen, mul)
    if not bool(torch.isfinite(lo) & torch.isfinite(hi)):
        raise CalibrationError(
            f"activation ranges must be finite, but the values of {_spelled(steps)} lie in [{lo.item()}, {hi.item()}]; "
            "the float model produced inf or nan, check its dtype and the records."
        )
    bounds = OBSERVERS[act_method].choose_range(seen, mul)
    return bounds if percentile is None else narrowed(bounds, seen, mul, percentile)


def _spelled(steps: Steps) -> str:
    match steps:
        case None:
            return "any step"
        case range():
            return f"steps {steps.start} to {steps.stop - 1}"
        case _:
            return f"step {steps}"


def _merged_counts(a: Histogram | None, b: Histogram | None, num_steps: int) -> Histogram | None:
    if a is None and b is None:
        return None
    if a is None or b is None:
        raise ValueError("merged statistics must both have a histogram or neither, but one of them has none.")
    left, right = (concatenate_steps([counts, empty_histogram(num_steps - counts.num_steps)]) for counts in (a, b))
    return merge_histograms(left, right)


def _padded(rows: Tensor, num_steps: int, empty: float) -> Tensor:
    if rows.shape[0] == num_steps:
        return rows
    blank = rows.new_full((num_steps - rows.shape[0], *rows.shape[1:]), empty)
    return torch.cat((rows, blank))
