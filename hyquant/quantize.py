"""Quantizing a denoiser in place: `quantize_` works out integers from a plan and statistics, `restore_` undoes it.

Per layer group: the smoothing multiplier (if any), activation ranges, int8 parameters of the input, then each member's
weight. All arithmetic is float32; the only copy of a weight is the temporary one being quantized. Then, per block, what
its quantized attention stores.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hyquant.attention.int8 import PARTS
from hyquant.attention.stats import HeadStats
from hyquant.calibration.stats import GroupStats
from hyquant.clock import StepClock
from hyquant.config import FrozenModel
from hyquant.errors import CalibrationError
from hyquant.kernels.x86_rows import has_rows_kernel, signal_and_noise
from hyquant.latency_report import KernelKind
from hyquant.layer_tensors import (
    attention_tensors_of,
    input_qparams,
    quantized_layer_tensors,
    rewritten_tensors,
    stored_ranges,
)
from hyquant.modules.swap import (
    attention_kinds,
    attention_tensors,
    float_linear,
    install_tensors_,
    quantized_tensors,
    restore_,
    structural_twin,
    swapped,
)
from hyquant.needs import needs_attention_stats, needs_histograms, needs_search, needs_smoothed_stats, needs_stats
from hyquant.numerics.blocks import row_blocks
from hyquant.numerics.error import decibels, sqnr_db_of_parts
from hyquant.plan import AttentionPlan, LayerPlan, QuantPlan
from hyquant.schemes.contract import LayerTensors
from hyquant.schemes.weights import dequantize_weight
from hyquant.smoothing import SMOOTHINGS
from hyquant.smoothing.folding import Edit, edited, weight_edits
from hyquant.smoothing.multiplier import multiplier
from hyquant.smoothing.search import column_absmax, unit_facts

__all__ = [
    "AttentionReport",
    "LayerReport",
    "QuantReport",
    "attention_tensors",
    "install_tensors_",
    "multipliers_of",
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
    kernel_kind: KernelKind


class QuantReport(FrozenModel):
    """What `quantize_` did: every quantized group and attention, and the bytes of weights before and after."""

    layers: tuple[LayerReport, ...]
    float_bytes: int
    weight_bytes: int
    attentions: tuple[AttentionReport, ...] = ()


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
    found = multipliers_of(plan, stats, _absmax_in(denoiser), scales=scales)
    return {
        layer.name: found[layer.name].to(float_linear(denoiser, layer.modules[0]).weight.device)
        for layer in plan.smoothed
    }


def multipliers_of(
    plan: QuantPlan,
    stats: Mapping[str, GroupStats],
    weight_absmax: Callable[[str], Tensor],
    *,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return what `smoothing_multipliers` does, without a denoiser.

    Args:
        plan: The plan.
        stats: Statistics of plain inputs by group name.
        weight_absmax: Module path -> [C] float32, largest |weight| per input channel.
        scales: Smoothing scales by group name.

    Raises:
        CalibrationError: As `smoothing_multipliers`.
    """
    multipliers: dict[str, Tensor] = {}
    for unit in plan.smoothing_units:
        if scales is not None or needs_search(plan):
            scale = _given_scale(plan, unit, scales)
        else:
            scale = _chosen_scale(plan, unit, stats, weight_absmax)
        for layer in unit:
            deploy_dtype = plan.config.deploy_dtype if layer.has_multiplier else "float32"
            multipliers[layer.name] = multiplier(scale, deploy_dtype)
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
        found |= dict.fromkeys((layer.name for layer in unit), _chosen_scale(plan, unit, stats, _absmax_in(denoiser)))
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
            ranges = stored_ranges(layer, plan, stats, smoothed_stats, mul)
            members, sqnr = _quantize_group(denoiser, layer, plan, ranges, edits)
            if layer.has_multiplier and mul is not None:
                members = [{**member, "mul_scale": mul} for member in members]
            tensors.update(zip(layer.modules, members, strict=True))
            widest = None if ranges is None else (ranges[0].amin().item(), ranges[1].amax().item())
            drafts.append((layer, sqnr, widest))
        for path in (path for layer in plan.rewritten for path in layer.modules):
            linear = float_linear(denoiser, path)
            tensors[path] = rewritten_tensors(linear.weight, linear.bias, edits[path])
        device = next(denoiser.parameters()).device
        attentions = {
            block.module: {
                name: tensor.to(device) for name, tensor in attention_tensors_of(block, plan, attention_stats).items()
            }
            for block in plan.quantized_attentions
        }
        install_tensors_(denoiser, plan, tensors, clock, attentions=attentions)
    kinds = attention_kinds(denoiser)
    report = QuantReport(
        layers=tuple(_layer_report(denoiser, *draft) for draft in drafts),
        float_bytes=float_bytes,
        weight_bytes=weight_bytes(denoiser),
        attentions=tuple(
            _attention_report(block, attentions[block.module], kinds[block.module])
            for block in plan.quantized_attentions
        ),
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
    linears = [float_linear(denoiser, path) for path in layer.modules]
    qparams = None if ranges is None else input_qparams(ranges, plan, linears[0].weight.device)
    members: list[LayerTensors] = []
    sqnrs: list[float] = []
    for path, linear in zip(layer.modules, linears, strict=True):
        weight, bias = edited(linear.weight, linear.bias, edits.get(path, ()))
        built = quantized_layer_tensors(layer, plan, weight, bias, qparams)
        sqnrs.append(_weight_sqnr_db(weight, built))
        members.append(built)
    return members, min(sqnrs)


def _weight_sqnr_db(weight: Tensor, tensors: LayerTensors) -> float:
    """Return how far what int8 stands for is from the float weight, in decibels."""
    scale = tensors.get("weight_scale")
    if scale is None:
        scale = (tensors["deq_scale"] / tensors["input_scale"])[:, None]
    if scale.shape[1] == 1 and has_rows_kernel(weight):
        return decibels(*signal_and_noise(weight, tensors["weight"], scale))
    return sqnr_db_of_parts(
        (weight[rows], dequantize_weight(tensors["weight"][rows], scale[rows])) for rows in row_blocks(weight)
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
    plan: QuantPlan,
    unit: tuple[LayerPlan, ...],
    stats: Mapping[str, GroupStats],
    weight_absmax: Callable[[str], Tensor],
) -> Tensor:
    config = plan.config.smoothing
    assert config is not None
    choose_scale = SMOOTHINGS[config.kind].choose_scale
    assert choose_scale is not None
    return choose_scale(config, unit_facts(unit, stats, weight_absmax))


def _absmax_in(denoiser: nn.Module) -> Callable[[str], Tensor]:
    return lambda path: column_absmax(float_linear(denoiser, path).weight)


def _given_scale(plan: QuantPlan, unit: tuple[LayerPlan, ...], scales: Mapping[str, Tensor] | None) -> Tensor:
    config, name = plan.config.smoothing, unit[0].name
    assert config is not None
    if scales is None or name not in scales:
        raise CalibrationError(
            f"{config.kind} must have a searched smoothing scale for {name}, but none was given; run "
            "hyquant.smoothing.search.search_scales on the calibration records and pass its result as scales."
        )
    return scales[name]


def _attention_report(block: AttentionPlan, tensors: Mapping[str, Tensor], kind: KernelKind) -> AttentionReport:
    absmax = None
    if block.scheme == "fa3_int8":
        q, k, v = (127 * tensors[f"{part}.scale"].amax().item() for part in PARTS)
        absmax = (q, k, v)
    return AttentionReport(name=block.name, scheme=str(block.scheme), act_absmax=absmax, kernel_kind=kind)
