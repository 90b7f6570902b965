"""Everything a plan takes from calibration records: `calibrate`, then `quantize_calibrated_`.

Which passes over the records are made depends on the plan: none for dynamic activations alone; one float pass for
stored ranges or smoothing scales; one for the heads of int8 attention; two for smoothing scales that are searched,
unless the first one could keep all inputs; one more where the range of a smoothed input does not follow from the plain
one; one per block for a sequential calibration.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hyquant.attention.observe import observe_attention
from hyquant.attention.stats import HeadStats, merge_head_stats
from hyquant.calibration.kept import KeptInputs
from hyquant.calibration.observe import observe
from hyquant.calibration.sequential import needs_float_stats, needs_sequential_stats, observe_sequential
from hyquant.calibration.stats import GroupStats, Stats
from hyquant.clock import StepClock
from hyquant.config import FA3Int8
from hyquant.distributed import Group, add_sums, merge_stats, run_together
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import Record
from hyquant.models.names import LayerGroup
from hyquant.modules.swap import restore_
from hyquant.needs import searches_first_record
from hyquant.plan import LayerPlan, QuantPlan
from hyquant.quantize import (
    QuantReport,
    needs_attention_stats,
    needs_histograms,
    needs_search,
    needs_smoothed_stats,
    quantize_,
    smoothing_multipliers,
    smoothing_scales,
)
from hyquant.schemes import SCHEMES
from hyquant.smoothing.search import search_scales


@dataclass(frozen=True)
class Calibrated:
    """What `quantize_` takes besides the plan; see there."""

    stats: Mapping[str, GroupStats]
    smoothed_stats: Mapping[str, GroupStats] | None = None
    scales: Mapping[str, Tensor] | None = None
    attention_stats: Mapping[str, HeadStats] | None = None


def calibrate(
    denoiser: nn.Module, plan: QuantPlan, records: Sequence[Record], clock: StepClock, *, group: Group | None = None
) -> Calibrated:
    """Gather what a plan takes from records, with as few passes over them as it needs.

    Args:
        denoiser: The denoiser; restored to float before and after.
        plan: What will be done to it.
        records: Captured denoiser calls; may be empty if the plan needs nothing from them.
        clock: Set to each record's step.
        group: Ranks with the same denoiser and plan, each with records of its own; all get what the records of all
            give, but where a smoothing looks at the first record only, it is the first of each. None for this process
            alone.

    Raises:
        CalibrationError: As `observe`, `search_scales`, `observe_attention` and `observe_sequential`.
    """
    ranks = Group() if group is None else group

    def join(own_pass: Callable[[], Stats]) -> Stats:
        return merge_stats(run_together(ranks, own_pass), ranks)

    restore_(denoiser)
    is_sequential, histograms = needs_sequential_stats(plan), needs_histograms(plan)
    stats: Stats = {}
    kept = KeptInputs(
        [layer.name for layer in plan.smoothed] if needs_search(plan) and not searches_first_record(plan) else []
    )
    if needs_float_stats(plan):
        watched = [_group(layer) for layer in plan.layers if layer.smoothed or _has_range(layer)]
        stats = join(
            lambda: observe(denoiser, watched, records, clock, stop_early=True, histograms=histograms, keep=kept)
        )
    heads = _heads(denoiser, plan, records, clock, ranks)
    scales = None
    if needs_search(plan):
        scales = search_scales(
            denoiser, plan, stats, records, clock, merge=lambda sums: add_sums(sums, ranks), inputs=kept.taken()
        )
    elif is_sequential:
        scales = smoothing_scales(denoiser, plan, stats)
    if is_sequential:
        found = observe_sequential(denoiser, plan, records, clock, join=join, scales=scales)
        return Calibrated(*found, scales, heads)
    smoothed_stats = None
    if needs_smoothed_stats(plan):
        mul = smoothing_multipliers(denoiser, plan, stats, scales=scales)
        groups = [_group(layer) for layer in plan.smoothed]
        smoothed_stats = join(lambda: observe(denoiser, groups, records, clock, mul=mul, histograms=histograms))
    return Calibrated(stats, smoothed_stats, scales, heads)


def quantize_calibrated_(denoiser: nn.Module, plan: QuantPlan, found: Calibrated, clock: StepClock) -> QuantReport:
    """Quantize a denoiser by a plan and what it took from the records; see `quantize_`."""
    return quantize_(
        denoiser,
        plan,
        found.stats,
        clock,
        smoothed_stats=found.smoothed_stats,
        scales=found.scales,
        attention_stats=found.attention_stats,
    )


def _heads(
    denoiser: nn.Module, plan: QuantPlan, records: Sequence[Record], clock: StepClock, ranks: Group
) -> dict[str, HeadStats] | None:
    config = plan.config.attention
    if not isinstance(config, FA3Int8) or not needs_attention_stats(plan):
        return None
    blocks = attention_blocks(denoiser)
    own = run_together(ranks, lambda: observe_attention(denoiser, blocks, records, clock, config))
    return merge_head_stats(own, ranks)


def _has_range(layer: LayerPlan) -> bool:
    return layer.scheme is not None and SCHEMES[layer.scheme].needs_range


def _group(layer: LayerPlan) -> LayerGroup:
    return LayerGroup(layer.name, layer.modules, layer.in_features, layer.out_features)
