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

from hyquant.config import ActMethod
from hyquant.errors import CalibrationError
from hyquant.observers import OBSERVERS


@dataclass(frozen=True)
class GroupStats:
    """Statistics of one layer group's input; a step without calls holds +inf, -inf and zeros.

    Attributes:
        lo: [T, C] float32, smallest value per step and input channel.
        hi: [T, C] float32, largest value per step and input channel.
        sum_lo: [T] float64, sum over calls of the smallest value of the whole call.
        sum_hi: [T] float64, sum over calls of the largest value of the whole call.
        calls: [T] int64, number of calls.
    """

    lo: Tensor = field(metadata={"merge": torch.minimum, "empty": float("inf")})
    hi: Tensor = field(metadata={"merge": torch.maximum, "empty": float("-inf")})
    sum_lo: Tensor = field(metadata={"merge": torch.add, "empty": 0})
    sum_hi: Tensor = field(metadata={"merge": torch.add, "empty": 0})
    calls: Tensor = field(metadata={"merge": torch.add, "empty": 0})

    @property
    def num_steps(self) -> int:
        """Return the number of steps T that the tensors have rows for."""
        return int(self.calls.shape[0])


Stats: TypeAlias = dict[str, GroupStats]
"""Statistics by canonical group name."""


def call_stats(x: Tensor) -> GroupStats:
    """Return the statistics of one call, as T = 1.

    Args:
        x: [..., C], the input of a layer group in one denoiser call; at least one row.
    """
    rows = x.reshape(-1, x.shape[-1])
    lo_C, hi_C = torch.amin(rows, dim=0).float(), torch.amax(rows, dim=0).float()
    return GroupStats(
        lo=lo_C[None],
        hi=hi_C[None],
        sum_lo=lo_C.amin()[None].double(),
        sum_hi=hi_C.amax()[None].double(),
        calls=torch.ones(1, dtype=torch.int64, device=x.device),
    )


def merge(a: GroupStats, b: GroupStats) -> GroupStats:
    """Join the statistics of two disjoint sets of calls; the shorter one is extended by steps without calls.

    Raises:
        ValueError: If the numbers of input channels differ.
    """
    if a.lo.shape[1] != b.lo.shape[1]:
        raise ValueError(f"merged statistics must have equal channels, but got {a.lo.shape[1]} and {b.lo.shape[1]}.")
    num_steps = max(a.num_steps, b.num_steps)
    joined = {}
    for each in fields(GroupStats):
        left, right = (_padded(getattr(s, each.name), num_steps, each.metadata["empty"]) for s in (a, b))
        joined[each.name] = each.metadata["merge"](left, right)
    return GroupStats(**joined)


def stack_steps(steps: Mapping[int, GroupStats]) -> GroupStats:
    """Put statistics of single steps (T = 1 each) into one table; steps in between that are missing have no calls."""
    table: dict[str, Tensor] = {}
    for each in fields(GroupStats):
        rows = {step_index: getattr(stats, each.name) for step_index, stats in steps.items()}
        blank = torch.full_like(next(iter(rows.values())), each.metadata["empty"])
        table[each.name] = torch.cat([rows.get(step_index, blank) for step_index in range(max(rows) + 1)])
    return GroupStats(**table)


def select_steps(stats: GroupStats, step_index: int | None) -> GroupStats:
    """Return the statistics of one step, or of all steps that have calls.

    Raises:
        CalibrationError: If there are no calls for that step, or none at all.
    """
    wanted = stats.calls > 0
    if step_index is not None:
        wanted = wanted & (torch.arange(stats.num_steps, device=wanted.device) == step_index)
    if not bool(wanted.any()):
        what = "any step" if step_index is None else f"step {step_index}"
        raise CalibrationError(
            f"calibration must have records of {what}, but it has {int(stats.calls.sum())} calls over "
            f"{stats.num_steps} steps and none there; capture records of every denoising step."
        )
    return GroupStats(**{each.name: getattr(stats, each.name)[wanted] for each in fields(GroupStats)})


def act_range(
    stats: GroupStats, act_method: ActMethod, step_index: int | None = None, mul: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the activation range that a method chooses.

    Args:
        stats: Statistics of the group.
        act_method: Key of `OBSERVERS`.
        step_index: The step to look at; None joins all steps.
        mul: [C] float32 > 0, what the input is multiplied by before it is quantized; None for unsmoothed groups or
            when `stats` were observed with it already.

    Returns:
        Two float32 scalars, lo <= hi.

    Raises:
        CalibrationError: If the step has no records, values are not finite, or the method cannot derive the range of
            the multiplied input from these statistics.
    """
    lo, hi = OBSERVERS[act_method].choose_range(select_steps(stats, step_index), mul)
    if not bool(torch.isfinite(lo) & torch.isfinite(hi)):
        raise CalibrationError(
            f"activation ranges must be finite, but got [{lo.item()}, {hi.item()}] at step {step_index}; "
            "the float model produced inf or nan, check its dtype and the records."
        )
    return lo, hi


def _padded(rows: Tensor, num_steps: int, empty: float) -> Tensor:
    if rows.shape[0] == num_steps:
        return rows
    blank = rows.new_full((num_steps - rows.shape[0], *rows.shape[1:]), empty)
    return torch.cat((rows, blank))
