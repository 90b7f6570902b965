"""One float pass over captured records that gathers every layer group's input statistics."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyquant.calibration.calls import replay
from hyquant.calibration.early_end import EarlyEnd
from hyquant.calibration.kept import KeptInputs
from hyquant.calibration.stats import GroupStats, Stats, call_stats, merge, stack_steps
from hyquant.clock import StepClock
from hyquant.errors import CalibrationError
from hyquant.models.base import Record
from hyquant.models.names import LayerGroup

logger = logging.getLogger(__name__)


def observe(
    denoiser: nn.Module,
    groups: Sequence[LayerGroup],
    records: Iterable[Record],
    clock: StepClock,
    *,
    mul: Mapping[str, Tensor] | None = None,
    stop_early: bool = False,
    histograms: bool = False,
    keep: KeptInputs | None = None,
) -> Stats:
    """Run the denoiser over records and return the statistics of every group's input.

    The first member of a group is watched; the others read the same tensor. Of a float denoiser without `mul` the
    result does not depend on any configuration, so one pass serves a whole study.

    Args:
        denoiser: The denoiser; what runs before the groups to watch may be quantized.
        groups: The groups to watch.
        records: Captured denoiser calls; moved to the denoiser's device one at a time.
        clock: Set to each record's step.
        mul: [C] multipliers by group name; the inputs of those groups are multiplied, in float32, before they are
            looked at. Groups without an entry are taken as they are.
        stop_early: End each call when all groups were seen as often as in the first call, which runs whole.
        histograms: Whether to count values too, for ranges that need to know how often they occur.
        keep: Is shown all inputs as they are.

    Returns:
        Statistics by group name with one row per step up to the last one recorded.

    Raises:
        CalibrationError: If there are no records, or a group's input is not finite; the message names it.
    """
    multipliers = mul or {}
    running: dict[str, dict[int, GroupStats]] = {group.name: {} for group in groups}
    device = next(denoiser.parameters()).device
    num_records = 0
    step_index = 0
    early_end = EarlyEnd()

    def note(name: str, x: Tensor) -> None:
        if keep is not None:
            keep.note(name, x)
        steps = running[name]
        seen = call_stats(x.float() * multipliers[name] if name in multipliers else x, histogram=histograms)
        steps[step_index] = merge(steps[step_index], seen) if step_index in steps else seen
        if stop_early:
            early_end.saw(name)

    with torch.inference_mode(), _watched(denoiser, groups, note):
        for record in records:
            step_index = record.step_index
            clock.set(step_index)
            with early_end.call():
                replay(denoiser, record, device)
            num_records += 1
    if num_records == 0:
        raise CalibrationError("calibration must have records, but got none; capture at least one prompt.")
    logger.info("observed records=%d groups=%d smoothed=%d", num_records, len(groups), len(multipliers))
    # Outside inference mode, so that the statistics are ordinary tensors.
    stats = {name: stack_steps(steps) for name, steps in running.items() if steps}
    _refuse_non_finite(stats)
    return stats


@contextmanager
def _watched(denoiser: nn.Module, groups: Sequence[LayerGroup], note: Any) -> Iterator[None]:
    def hook_for(name: str) -> Any:
        return lambda module, args: note(name, args[0])

    handles = [
        denoiser.get_submodule(group.modules[0]).register_forward_pre_hook(hook_for(group.name)) for group in groups
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_non_finite(stats: Stats) -> None:
    for name, group in stats.items():
        seen = group.calls > 0
        healthy = torch.isfinite(group.lo).all(dim=1) & torch.isfinite(group.hi).all(dim=1)
        broken = (seen & ~healthy).nonzero().flatten().tolist()
        if broken:
            raise CalibrationError(
                f"activations must be finite, but the input of {name} is not at steps {broken[:5]}; "
                "run the float model in a wider dtype or check its weights."
            )
