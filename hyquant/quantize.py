"""Quantizing a denoiser in place: `quantize_` works out int8 tensors from a plan and statistics, `restore_` undoes it.

Per layer group: the smoothing multiplier (if any), activation ranges, int8 parameters of the input, then each member's
weight. All arithmetic is float32; the only copy of a weight is the temporary one being quantized. Then, per block, what
its quantized attention stores.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hyquant.attention.fp8 import fp8_tensors
from hyquant.attention.int8 import PARTS, int8_tensors
from hyquant.attention.stats import HeadStats
from hyquant.calibration.stats import GroupStats, Steps, act_range
from hyquant.clock import StepClock
from hyquant.config import FA3Fp8, FA3Int8, FrozenModel, StoredRange, W8A8Timestep
from hyquant.errors import CalibrationError
from hyquant.latency_report import KernelKind
from hyquant.modules.swap import (
    attention_tensors,
    float_linear,
    install_tensors_,
    quantized_tensors,
    restore_,
    structural_twin,
    swapped,
)
from hyquant.numerics.blocks import row_blocks
from hyquant.numerics.error import sqnr_db_of_parts
from hyquant.numerics.qparams import QParams, choose_qparams
from hyquant.observers import OBSERVERS
from hyquant.plan import AttentionPlan, LayerPlan, QuantPlan
from hyquant.schemes import SCHEMES
from hyquant.schemes.contract import LayerTensors
from hyquant.smoothing import SMOOTHINGS
from hyquant.smoothing.folding import Edit, edited, weight_edits
from hyquant.smoothing.multiplier import multiplier
from hyquant.smoothing.search import unit_facts

__all__ = [
    "AttentionReport",
    "LayerReport",
    "QuantReport",
    "attention_tensors",
    "install_tensors_",
    "needs_attention_stats",
    "needs_histograms",
    "needs_search",
    "needs_smoothed_stats",
    "needs_stats",
    "quantize_",
    "quantized_tensors",
    "restore_",
    "smoothing_multipliers",
    "smoothing_scales",
    "structural_twin",
    "weight_bytes",
]

logger = logging.getLogger(__name__)


class LayerReport(FrozenModel):
    """What quantization did to one layer group.

    `weight_sqnr_db` compares the (smoothed) float weight with what int8 keeps of it, for the worst member. `act_lo` and
    `act_hi` are the widest stored activation range over the steps; None where each input has its own. `kernel_kind`
    says whether the product runs natively in int8 here.
    """

    name: str
    scheme: str
    smoothed: bool
    weight_sqnr_db: float
    act_lo: float | None
    act_hi: float | None
    kernel_kind: str


class AttentionReport(FrozenModel):
    """What quantization did to the attention of one block.

    `act_absmax` is the largest value that int8 represents in any head, of q, k and v; None where each input has its own
    scale. `kernel_kind` says whether the attention runs natively in 8 bits here.
    """

    name: str
    scheme: str
    act_absmax: tuple[float, float, float] | None
    kernel_kind: KernelKind = "simulated"


class QuantReport(FrozenModel):
    """What `quantize_` did: every quantized group and attention, and the bytes of weights before and after."""

    layers: tuple[LayerReport, ...]
    float_bytes: int
    weight_bytes: int
    attentions: tuple[AttentionReport, ...] = ()


def needs_stats(plan: QuantPlan) -> bool:
    """Return whether a plan needs calibration statistics at all."""
    return bool(plan.smoothed) or any(SCHEMES[str(layer.scheme)].needs_range for layer in plan.quantized)


def needs_histograms(plan: QuantPlan) -> bool:
    """Return whether ranges need to know how often values occur (`observe(..., histograms=True)`)."""
    linear = plan.config.linear
    if not isinstance(linear, StoredRange) or not plan.quantized:
        return False
    return OBSERVERS[linear.act_method].needs_histogram or linear.percentile is not None


def needs_smoothed_stats(plan: QuantPlan) -> bool:
    """Return whether ranges of smoothed layers need statistics of the smoothed input (`observe(..., mul=...)`)."""
    linear = plan.config.linear
    if not isinstance(linear, StoredRange) or not plan.smoothed:
        return False
    return not OBSERVERS[linear.act_method].follows_multiplier or linear.percentile is not None


def needs_attention_stats(plan: QuantPlan) -> bool:
    """Return whether a plan needs statistics of q, k and v: int8 attention stores its scales."""
    return any(block.scheme == "fa3_int8" for block in plan.attentions)


def needs_search(plan: QuantPlan) -> bool:
    """Return whether smoothing scales must be searched first (`hyquant.smoothing.search.search_scales`)."""
    config = plan.config.smoothing
    return config is not None and bool(plan.smoothed) and SMOOTHINGS[config.kind].is_searched(config)


def smoothing_multipliers(
    denoiser: nn.Module,
    plan: QuantPlan,
    stats: Mapping[str, GroupStats],
    *,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return what the input of every smoothed group is multiplied by: 1 / s.

    Args:
        denoiser: The float denoiser.
        plan: The plan.
        stats: Statistics of plain inputs by group name.
        scales: Smoothing scales by group name, searched or chosen before; needed where `needs_search(plan)`, else by
            the plan's formula from `stats`.

    Returns:
        [C] float32 > 0 by group name; exactly representable in the plan's deployment dtype where the engine multiplies
        (placement "multiplier").

    Raises:
        CalibrationError: If a smoothed group has no statistics, or scales must be searched and are not given.
    """
    config = plan.config.smoothing
    multipliers: dict[str, Tensor] = {}
    for unit in plan.smoothing_units:
        assert config is not None
        if scales is not None or needs_search(plan):
            scale = _given_scale(plan, unit, scales)
        else:
            scale = _chosen_scale(denoiser, plan, unit, stats)
        for layer in unit:
            weight = float_linear(denoiser, layer.modules[0]).weight
            deploy_dtype = plan.config.deploy_dtype if layer.has_multiplier else "float32"
            multipliers[layer.name] = multiplier(scale.to(weight.device), deploy_dtype)
    return multipliers


def smoothing_scales(denoiser: nn.Module, plan: QuantPlan, stats: Mapping[str, GroupStats]) -> dict[str, Tensor]:
    """Return the smoothing scales that the plan's formula gives, where none are searched.

    Args:
        denoiser: The float denoiser.
        plan: The plan.
        stats: Statistics of plain inputs of the float denoiser by group name.

    Returns:
        [C] float32 > 0 by group name, for `quantize_(..., scales=...)`.

    Raises:
        CalibrationError: If a smoothed group has no statistics.
    """
    found: dict[str, Tensor] = {}
    for unit in plan.smoothing_units:
        found |= dict.fromkeys((layer.name for layer in unit), _chosen_scale(denoiser, plan, unit, stats))
    return found


def quantize_(
    denoiser: nn.Module,
    plan: QuantPlan,
    stats: Mapping[str, GroupStats],
    clock: StepClock,
    *,
    smoothed_stats: Mapping[str, GroupStats] | None = None,
    scales: Mapping[str, Tensor] | None = None,
    attention_stats: Mapping[str, HeadStats] | None = None,
) -> QuantReport:
    """Replace the planned Linears of a denoiser by int8 ones, and quantize the planned attentions.

    It always starts from float: a quantized denoiser is restored first. If anything is wrong the denoiser is left in
    float. The float modules are kept aside for `restore_`.

    Args:
        denoiser: The denoiser; changed in place.
        plan: What to do to which layer.
        stats: Statistics by group name; may be empty if `needs_stats(plan)` is false.
        clock: The clock that time-step dependent layers follow.
        smoothed_stats: Statistics of inputs under `smoothing_multipliers`; only where `needs_smoothed_stats(plan)`,
            and with histograms where `needs_histograms(plan)`, as `stats`.
        scales: Smoothing scales by group name, from `search_scales` where `needs_search(plan)`; else they follow from
            `stats` unless they are given.
        attention_stats: Statistics of q, k and v by block name, from `hyquant.attention.observe`; only where
            `needs_attention_stats(plan)`.

    Returns:
        A report per layer group and per quantized attention.

    Raises:
        CalibrationError: If statistics are missing (the message names layer and step) or not finite, or smoothing
            scales must be searched and are not given.
        LayerMatchError: If the plan was built for another denoiser.
    """
    restore_(denoiser)
    float_bytes = weight_bytes(denoiser)
    tensors: dict[str, LayerTensors] = {}
    drafts: list[tuple[LayerPlan, float, tuple[float, float] | None]] = []
    # Not in inference mode even if the caller is: the step buffers must be ordinary tensors to be refilled later.
    with torch.inference_mode(False), torch.no_grad():
        multipliers = smoothing_multipliers(denoiser, plan, stats, scales=scales)
        edits = weight_edits(plan, multipliers)
        for layer in plan.quantized:
            mul = multipliers.get(layer.name)
            ranges = _ranges(layer, plan, stats, smoothed_stats, mul)
            members, sqnr = _quantize_group(denoiser, layer, plan, ranges, edits)
            if layer.has_multiplier and mul is not None:
                members = [{**member, "mul_scale": mul} for member in members]
            tensors.update(zip(layer.modules, members, strict=True))
            widest = None if ranges is None else (ranges[0].amin().item(), ranges[1].amax().item())
            drafts.append((layer, sqnr, widest))
        for path in (path for layer in plan.rewritten for path in layer.modules):
            tensors[path] = _rewritten(float_linear(denoiser, path), edits[path])
        device = next(denoiser.parameters()).device
        attentions = {
            block.module: {name: tensor.to(device) for name, tensor in _attention(block, plan, attention_stats).items()}
            for block in plan.quantized_attentions
        }
        install_tensors_(denoiser, plan, tensors, clock, attentions=attentions)
    report = QuantReport(
        layers=tuple(_layer_report(denoiser, *draft) for draft in drafts),
        float_bytes=float_bytes,
        weight_bytes=weight_bytes(denoiser),
        attentions=tuple(_attention_report(block, attentions[block.module]) for block in plan.quantized_attentions),
    )
    logger.info(
        "quantized groups=%d attentions=%d weight_bytes=%d",
        len(report.layers),
        len(report.attentions),
        report.weight_bytes,
    )
    return report


def weight_bytes(denoiser: nn.Module) -> int:
    """Return the bytes of a denoiser's weights: float parameters plus, where quantized, the tensors of an export."""
    floats: list[Tensor] = list(denoiser.parameters())
    integers = [tensor for tensors in quantized_tensors(denoiser).values() for tensor in tensors.values()]
    held = {id(tensor): tensor for tensor in floats + integers}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def _quantize_group(
    denoiser: nn.Module,
    layer: LayerPlan,
    plan: QuantPlan,
    ranges: tuple[Tensor, Tensor] | None,
    edits: Mapping[str, Sequence[Edit]],
) -> tuple[list[LayerTensors], float]:
    """Return the contract tensors of each member, but its multiplier, and the lowest weight SQNR among them."""
    scheme = SCHEMES[str(layer.scheme)]
    linears = [float_linear(denoiser, path) for path in layer.modules]
    deploy_dtype = plan.config.deploy_dtype
    input_qparams: QParams | None = None
    if ranges is not None:
        lo, hi = (bound.to(linears[0].weight.device) for bound in ranges)
        input_qparams = choose_qparams(lo, hi, symmetric=False, deploy_dtype=deploy_dtype)
    members: list[LayerTensors] = []
    sqnrs: list[float] = []
    for path, linear in zip(layer.modules, linears, strict=True):
        weight, bias = edited(linear, edits.get(path, ()))
        built = scheme.build(weight, bias, input_qparams, deploy_dtype, division_dtype=plan.config.division_dtype)
        sqnrs.append(_weight_sqnr_db(weight, built))
        members.append(built)
    return members, min(sqnrs)


def _rewritten(linear: nn.Linear, edits: Sequence[Edit]) -> LayerTensors:
    """Return weight and bias of a Linear that stays in float, in its dtype."""
    weight, bias = edited(linear, edits)
    tensors = {"weight": weight, "bias": bias}
    return {name: tensor.to(linear.weight.dtype) for name, tensor in tensors.items() if tensor is not None}


def _ranges(
    layer: LayerPlan,
    plan: QuantPlan,
    stats: Mapping[str, GroupStats],
    smoothed_stats: Mapping[str, GroupStats] | None,
    mul: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Return the stored ranges of a group: lo and hi [1], or [T, 1] for a scheme per step; None if it stores none."""
    scheme, linear = SCHEMES[str(layer.scheme)], plan.config.linear
    if not scheme.needs_range or not isinstance(linear, StoredRange):
        return None
    group = _stats_of(layer, stats)
    if layer.smoothed and smoothed_stats is not None and needs_smoothed_stats(plan):
        group, mul = _stats_of(layer, smoothed_stats), None
    try:
        bounds = [
            act_range(group, linear.act_method, steps, mul, percentile=linear.percentile)
            for steps in _steps_per_range(linear, plan.num_steps)
        ]
    except CalibrationError as error:
        raise CalibrationError(f"{layer.name}: {error}") from error
    lo, hi = (torch.stack(column) for column in zip(*bounds, strict=True))
    return (lo[:, None], hi[:, None]) if scheme.is_per_step else (lo, hi)


def _steps_per_range(linear: StoredRange, num_steps: int) -> list[Steps]:
    """Return for each stored range the steps whose records it comes from."""
    if not isinstance(linear, W8A8Timestep):
        return [None]
    if linear.rows == "step":
        return list(range(num_steps))
    return [range(step_index, num_steps) for step_index in range(num_steps)]


def _weight_sqnr_db(weight: Tensor, tensors: LayerTensors) -> float:
    """Return how far what int8 stands for is from the float32 weight, in decibels."""
    scale = tensors.get("weight_scale")
    if scale is None:
        scale = (tensors["deq_scale"] / tensors["input_scale"])[:, None]
    return sqnr_db_of_parts(
        (weight[rows], tensors["weight"][rows].float().mul_(scale[rows])) for rows in row_blocks(weight)
    )


def _layer_report(
    denoiser: nn.Module, layer: LayerPlan, weight_sqnr_db: float, widest: tuple[float, float] | None
) -> LayerReport:
    state = swapped(denoiser)
    assert state is not None
    return LayerReport(
        name=layer.name,
        scheme=str(layer.scheme),
        smoothed=layer.smoothed,
        weight_sqnr_db=weight_sqnr_db,
        act_lo=None if widest is None else widest[0],
        act_hi=None if widest is None else widest[1],
        kernel_kind=state.quantized[layer.modules[0]].kernel_kind,
    )


def _chosen_scale(
    denoiser: nn.Module, plan: QuantPlan, unit: tuple[LayerPlan, ...], stats: Mapping[str, GroupStats]
) -> Tensor:
    config = plan.config.smoothing
    assert config is not None
    choose_scale = SMOOTHINGS[config.kind].choose_scale
    assert choose_scale is not None
    return choose_scale(config, unit_facts(denoiser, unit, stats))


def _given_scale(plan: QuantPlan, unit: tuple[LayerPlan, ...], scales: Mapping[str, Tensor] | None) -> Tensor:
    config, name = plan.config.smoothing, unit[0].name
    assert config is not None
    if scales is None or name not in scales:
        raise CalibrationError(
            f"{config.kind} must have a searched smoothing scale for {name}, but none was given; run "
            "hyquant.smoothing.search.search_scales on the calibration records and pass its result as scales."
        )
    return scales[name]


def _attention(block: AttentionPlan, plan: QuantPlan, stats: Mapping[str, HeadStats] | None) -> dict[str, Tensor]:
    """Return the contract tensors of one block's attention."""
    config, deploy_dtype = plan.config.attention, plan.config.deploy_dtype
    if isinstance(config, FA3Fp8):
        return fp8_tensors(block.head_dim, deploy_dtype, rotate=config.rotate)
    assert isinstance(config, FA3Int8)
    if stats is None or block.name not in stats:
        raise CalibrationError(
            f"int8 attention of {block.name} must have statistics of q, k and v, but there are none; gather them by "
            "hyquant.attention.observe.observe_attention and pass them as attention_stats."
        )
    seen = stats[block.name]
    if seen.lo.shape[1] != block.heads:
        raise CalibrationError(
            f"statistics of {block.name} must be of {block.heads} heads, but are of {seen.lo.shape[1]}; observe this "
            "denoiser."
        )
    try:
        return int8_tensors(seen, deploy_dtype)
    except CalibrationError as error:
        raise CalibrationError(f"attention of {block.name}: {error}") from error


def _attention_report(block: AttentionPlan, tensors: Mapping[str, Tensor]) -> AttentionReport:
    absmax = None
    if block.scheme == "fa3_int8":
        q, k, v = (127 * tensors[f"{part}.scale"].amax().item() for part in PARTS)
        absmax = (q, k, v)
    return AttentionReport(name=block.name, scheme=str(block.scheme), act_absmax=absmax)


def _stats_of(layer: LayerPlan, stats: Mapping[str, GroupStats]) -> GroupStats:
    if layer.name not in stats:
        raise CalibrationError(
            f"{layer.name} must have calibration statistics, but there are none; observe records with this group."
        )
    return stats[layer.name]
