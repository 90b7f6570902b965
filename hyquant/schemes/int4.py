"""int4 weights, in [-8, 7] and stored as int8: one scale per output channel, or per group of its input channels.

    s_w[n, g] = max(max_k W / 7, -min_k W / 8)          W_q = clamp(round(W / s_w), -8, 7)          k in group g

All of the 16 codes are used: where the largest magnitude is negative, the scale is an eighth of it and not a seventh.
Codes and groups are those of `npu_weight_quant_batchmatmul` (`antiquant_group_size`, 32 or a multiple of it).

N output channels   K input channels   G groups of K / G input channels
"""

import torch
from torch import Tensor

from hyquant.config import DeployDtype
from hyquant.numerics.granularity import PerChannel, extremes
from hyquant.numerics.qparams import QParams, choose_int4_qparams
from hyquant.schemes.base import WEIGHT_CODES, Spec
from hyquant.schemes.contract import LayerTensors
from hyquant.schemes.weights import quantized_rows


def quantize_int4_weight(
    weight_NK: Tensor, deploy_dtype: DeployDtype, *, group_size: int = 0, division_dtype: DeployDtype = "float32"
) -> tuple[Tensor, Tensor]:
    """Return int4 weights, as int8, and their scales.

    Args:
        weight_NK: [N, K] in a float dtype; the arithmetic is float32.
        deploy_dtype: Dtype the scales are rounded to before the weights are quantized.
        group_size: Input channels that share a scale, a divisor of K; 0 for all.
        division_dtype: What weight / scale is rounded to before it is rounded to an integer.

    Returns:
        [N, K] int8 in [-8, 7] and [N, G] float32.
    """
    groups = weight_NK if group_size == 0 else weight_NK.reshape(-1, group_size)
    lo, hi = extremes(groups, PerChannel())
    qparams = choose_int4_qparams(lo, hi, deploy_dtype=deploy_dtype)
    qmin, qmax = WEIGHT_CODES[4]
    weight_q = quantized_rows(groups, qparams.scale, qmin=qmin, qmax=qmax, division_dtype=division_dtype)
    return weight_q.reshape(weight_NK.shape), qparams.scale.reshape(len(weight_NK), -1)


def build_int4(
    weight: Tensor,
    bias: Tensor | None,
    input_qparams: QParams | None,
    deploy_dtype: DeployDtype,
    *,
    division_dtype: DeployDtype = "float32",
    group_size: int = 0,
) -> LayerTensors:
    """Return weight, weight_scale and bias; calibration has no part in it (`input_qparams` is None)."""
    assert input_qparams is None
    weight_q, weight_scale = quantize_int4_weight(
        weight, deploy_dtype, group_size=group_size, division_dtype=division_dtype
    )
    tensors = {"weight": weight_q, "weight_scale": weight_scale}
    return tensors if bias is None else {**tensors, "bias": bias.float()}


def int4_specs(rows: int, columns: int, num_steps: int, *, group_size: int = 0) -> dict[str, Spec]:
    """Return dtype and shape of the tensors of N output and K input channels, however many steps there are."""
    num_groups = 1 if group_size == 0 else columns // group_size
    return {"weight": (torch.int8, (rows, columns)), "weight_scale": (torch.float32, (rows, num_groups))}
