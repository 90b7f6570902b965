"""The arithmetic of quantization on plain tensors: from weights and statistics to what is stored of a layer.

There is no module here, so it serves a denoiser in memory (`hyquant.quantize`) and a checkpoint that is read piece by
piece (`hyquant.checkpoint`) alike.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hyquant.attention.fp8 import fp8_tensors
from hyquant.attention.int8 import int8_tensors
from hyquant.attention.stats import HeadStats
from hyquant.calibration.stats import GroupStats, Steps, act_range
from hyquant.config import FA3Fp8, FA3Int8, StoredRange, W8A8Timestep
from hyquant.errors import CalibrationError
from hyquant.needs import needs_smoothed_stats
from hyquant.numerics.qparams import QParams, choose_qparams
from hyquant.plan import AttentionPlan, LayerPlan, QuantPlan
from hyquant.schemes import SCHEMES, scheme_of
from hyquant.schemes.contract import LayerTensors
from hyquant.smoothing.folding import Edit, edited


def input_qparams(ranges: tuple[Tensor, Tensor], plan: QuantPlan, device: torch.device) -> QParams:
    """Return scale and zero point of a group's input, [1] or [T, 1] float32, for stored ranges.

    Raises:
        CalibrationError: If a range is not finite, or its scale overflows the deployment dtype.
    """
    lo, hi = (bound.to(device) for bound in ranges)
    return choose_qparams(lo, hi, symmetric=False, deploy_dtype=plan.config.deploy_dtype)


def quantized_layer_tensors(
    layer: LayerPlan, plan: QuantPlan, weight: Tensor, bias: Tensor | None, qparams: QParams | None
) -> LayerTensors:
    """Return the contract tensors of a Linear of a quantized group, or of some of its rows, but its multiplier.

    Args:
        layer: The group.
        plan: Its plan.
        weight: [N, K] in a float dtype.
        bias: [N] float32, or None.
        qparams: Scale and zero point of the input; None where they come from each input.

    Raises:
        CalibrationError: If a row's scale is not finite or overflows the deployment dtype.
    """
    assert plan.config.linear is not None
    build = scheme_of(plan.config.linear).build
    return build(weight, bias, qparams, plan.config.deploy_dtype, division_dtype=plan.config.division_dtype)


def rewritten_tensors(weight: Tensor, bias: Tensor | None, edits: Sequence[Edit]) -> LayerTensors:
    """Return weight and bias of a Linear that stays in float, edited, in its dtype."""
    new_weight, new_bias = edited(weight, bias, edits)
    tensors = {"weight": new_weight, "bias": new_bias}
    return {name: tensor.to(weight.dtype) for name, tensor in tensors.items() if tensor is not None}


def stored_ranges(
    layer: LayerPlan,
    plan: QuantPlan,
    stats: Mapping[str, GroupStats],
    smoothed_stats: Mapping[str, GroupStats] | None,
    mul: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Return the stored ranges of a group: lo and hi [1], or [T, 1] for a scheme per step; None if it stores none.

    Args:
        layer: The group.
        plan: Its plan.
        stats: Statistics of plain inputs by group name.
        smoothed_stats: Statistics of smoothed inputs, where `needs_smoothed_stats(plan)`.
        mul: [C] float32, what the group's input is multiplied by; None if it is not smoothed.

    Raises:
        CalibrationError: If statistics are missing (the message names layer and step) or not finite.
    """
    scheme, linear = SCHEMES[str(layer.scheme)], plan.config.linear
    if not scheme.needs_range or not isinstance(linear, StoredRange):
        return None
    group = _stats_of(layer, stats)
    if layer.smoothed and smoothed_stats is not None and needs_smoothed_stats(plan):
        group, mul = _stats_of(layer, smoothed_stats), None
    if mul is not None:  # it is where the weights are; merged and stored statistics are on the CPU
        mul = mul.to(group.lo.device)
    try:
        bounds = [
            act_range(group, linear.act_method, steps, mul, percentile=linear.percentile)
            for steps in _steps_per_range(linear, plan.num_steps)
        ]
    except CalibrationError as error:
        raise CalibrationError(f"{layer.name}: {error}") from error
    lo, hi = (torch.stack(column) for column in zip(*bounds, strict=True))
    return (lo[:, None], hi[:, None]) if scheme.is_per_step else (lo, hi)


def attention_tensors_of(
    block: AttentionPlan, plan: QuantPlan, stats: Mapping[str, HeadStats] | None
) -> dict[str, Tensor]:
    """Return the contract tensors of one block's attention, on the CPU.

    Raises:
        CalibrationError: If int8 attention has no statistics, or those of another denoiser.
        ConfigError: If heads of this size cannot be rotated.
    """
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


def _steps_per_range(linear: StoredRange, num_steps: int) -> list[Steps]:
    """Return for each stored range the steps whose records it comes from."""
    if not isinstance(linear, W8A8Timestep):
        return [None]
    if linear.rows == "step":
        return list(range(num_steps))
    return [range(step_index, num_steps) for step_index in range(num_steps)]


def _stats_of(layer: LayerPlan, stats: Mapping[str, GroupStats]) -> GroupStats:
    if layer.name not in stats:
        raise CalibrationError(
            f"{layer.name} must have calibration statistics, but there are none; observe records with this group."
        )
    return stats[layer.name]
