"""One float pass over captured records that gathers the range of every head's q, k and v."""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hyquant.attention.stats import HeadStats, head_stats, merge, ratios_of
from hyquant.calibration.calls import replay
from hyquant.clock import StepClock
from hyquant.config import FA3Int8
from hyquant.errors import CalibrationError
from hyquant.models.attentions import AttentionBlock, QkvHook, hooked
from hyquant.models.base import Record

logger = logging.getLogger(__name__)


def observe_attention(
    denoiser: nn.Module,
    blocks: Sequence[AttentionBlock],
    records: Iterable[Record],
    clock: StepClock,
    config: FA3Int8,
) -> dict[str, HeadStats]:
    """Run the float denoiser over records and return the statistics of every block's q, k and v.

    They are taken where attention begins: after normalization and rotary embedding, video and text together, without
    padded text. They depend on the configuration's statistic and ratios only.

    Args:
        denoiser: The float denoiser.
        blocks: The blocks to watch.
        records: Captured denoiser calls; moved to the denoiser's device one at a time.
        clock: Set to each record's step.
        config: Says which interval is taken of each head.

    Returns:
        Statistics by canonical block name.

    Raises:
        CalibrationError: If there are no records, or q, k or v is not finite; the message names the block.
        ConfigError: If a block's attention cannot be intercepted, or is already.
    """
    ratios = ratios_of(config)
    running: dict[str, HeadStats] = {}

    def watch(name: str) -> QkvHook:
        def note(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            seen = head_stats(q, k, v, valid, ratios)
            running[name] = merge(running[name], seen) if name in running else seen
            return q, k, v

        return note

    device = next(denoiser.parameters()).device
    num_records = 0
    # no_grad and not inference mode, so that the statistics are ordinary tensors.
    with torch.no_grad(), hooked(denoiser, {block.module: watch(block.name) for block in blocks}):
        for record in records:
            clock.set(record.step_index)
            replay(denoiser, record, device)
            num_records += 1
    if num_records == 0:
        raise CalibrationError("calibration must have records, but got none; capture at least one prompt.")
    logger.info("observed attention records=%d blocks=%d", num_records, len(running))
    _refuse_non_finite(running)
    return running


def _refuse_non_finite(stats: Mapping[str, HeadStats]) -> None:
    for name, block in stats.items():
        for row, part in enumerate("qkv"):
            healthy = torch.isfinite(block.lo[row]) & torch.isfinite(block.hi[row])
            broken = (~healthy).nonzero().flatten().tolist()
            if broken:
                raise CalibrationError(
                    f"activations must be finite, but {part} of {name} is not in heads {broken[:5]}; "
                    "run the float model in a wider dtype or check its weights."
                )
