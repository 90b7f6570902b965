"""What calibration remembers of each block's q, k and v: one interval per head, over all tokens and all steps.

A `HeadStats` is a monoid like `hyquant.calibration.stats.GroupStats`: `head_stats` makes it of one denoiser call,
`merge` joins two in any order, and how each field merges is declared beside it. Heads are looked at one by one, which
bounds memory to the values of one head (61 MB for 119 000 tokens of 128).

B batch   S tokens   A heads   D head dim
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from hyquant.attention.window import narrowest_window
from hyquant.config import FA3Int8
from hyquant.distributed import Group


class Ratios(NamedTuple):
    """The share of each head's values that its interval holds, for q, k and v."""

    q: float
    k: float
    v: float


@dataclass(frozen=True)
class HeadStats:
    """Intervals of one block's q, k and v (rows 0, 1, 2) per head.

    Attributes:
        lo: [3, A] float32, lower bound; the lowest over calls.
        hi: [3, A] float32, upper bound; the highest over calls.
        calls: [1] int64, number of denoiser calls.
    """

    lo: Tensor = field(metadata={"merge": torch.minimum})
    hi: Tensor = field(metadata={"merge": torch.maximum})
    calls: Tensor = field(metadata={"merge": torch.add})


def ratios_of(config: FA3Int8) -> Ratios:
    """Return what a configuration's statistic keeps; the absolute maximum is the window that keeps everything."""
    if config.statistic == "absmax":
        return Ratios(1.0, 1.0, 1.0)
    return Ratios(config.ratio_qk, config.ratio_qk, config.ratio_v)


def head_stats(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, ratios: Ratios) -> HeadStats:
    """Return the statistics of one denoiser call.

    Args:
        q: [B, S, A, D], as it enters the attention; any number of tokens.
        k: As q.
        v: As q.
        valid: [B, S] bool, False for padded tokens, which are left out; None if there are none.
        ratios: The shares to keep.
    """
    rows = [
        [narrowest_window(_head(x, head, valid), ratio) for head in range(x.shape[2])]
        for x, ratio in zip((q, k, v), ratios, strict=True)
    ]
    lo, hi = (torch.stack([torch.stack([head[bound] for head in row]) for row in rows]) for bound in (0, 1))
    return HeadStats(lo=lo, hi=hi, calls=torch.ones(1, dtype=torch.int64, device=lo.device))


def merge(a: HeadStats, b: HeadStats) -> HeadStats:
    """Join the statistics of two disjoint sets of calls.

    Raises:
        ValueError: If the numbers of heads differ.
    """
    if a.lo.shape != b.lo.shape:
        raise ValueError(f"merged statistics must have equal heads, but got {a.lo.shape[1]} and {b.lo.shape[1]}.")
    return HeadStats(**{each.name: each.metadata["merge"](*_both(a, b, each.name)) for each in fields(HeadStats)})


def pack_head_stats(stats: Mapping[str, HeadStats]) -> dict[str, Tensor]:
    """Return statistics as tensors `BLOCK/FIELD`."""
    return {f"{block}/{each.name}": getattr(stats[block], each.name) for block in stats for each in fields(HeadStats)}


def unpack_head_stats(tensors: Mapping[str, Tensor]) -> dict[str, HeadStats]:
    """Undo `pack_head_stats`."""
    blocks = sorted({key.rpartition("/")[0] for key in tensors})
    return {
        block: HeadStats(**{each.name: tensors[f"{block}/{each.name}"] for each in fields(HeadStats)})
        for block in blocks
    }


def merge_head_stats(stats: Mapping[str, HeadStats], group: Group) -> dict[str, HeadStats]:
    """Return statistics over the records of all ranks, equal on every rank; a rank without records gives none."""
    merged: dict[str, HeadStats] = {}
    for tensors in group.all_gather_tensors(pack_head_stats(stats)):
        for block, part in unpack_head_stats(tensors).items():
            merged[block] = merge(merged[block], part) if block in merged else part
    return merged


def _head(x_BSAD: Tensor, head: int, valid: Tensor | None) -> Tensor:
    head_BSD = x_BSAD[:, :, head]
    return (head_BSD if valid is None else head_BSD[valid]).flatten()


def _both(a: HeadStats, b: HeadStats, name: str) -> tuple[Tensor, Tensor]:
    return getattr(a, name), getattr(b, name)
