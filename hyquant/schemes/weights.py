"""int8 weights, one symmetric scale per output channel, and the constants of the static matrix product.

    y = x W^T + b ≈ ((x_q - z) W_q^T) s_x s_w + b = (x_q W_q^T + quant_bias) deq_scale
    deq_scale = s_x s_w        quant_bias = round(b / deq_scale - z sum_k W_q)

Source: gemmlowp's quantization document (zero-point terms folded into the bias); the constants of npu_quant_matmul.

N output channels   K input channels   T table rows
"""

import torch
from torch import Tensor

from hyquant.config import DeployDtype
from hyquant.kernels.x86_rows import has_rows_kernel, quantize_rows, row_absmax, row_sums, sums_rows
from hyquant.numerics.affine import quantize
from hyquant.numerics.blocks import row_blocks
from hyquant.numerics.granularity import PerChannel, extremes
from hyquant.numerics.qparams import QParams, choose_qparams
from hyquant.schemes.base import Spec

_MAX_BIAS_STEPS = 2.0**30
_EXACT_FLOAT_SUM = 2**17


def quantize_weight(
    weight_NK: Tensor,
    deploy_dtype: DeployDtype,
    *,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    division_dtype: DeployDtype = "float32",
    mul: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return int8 weights in [-127, 127] and their scales.

    The scale is absmax / 127 per output channel. Given the bias and input scales of a static product, a row whose
    bias would not fit the int32 accumulator (more than 2^30 steps) gets the larger scale at which it does.

    Args:
        weight_NK: [N, K] in a float dtype; the arithmetic is float32.
        deploy_dtype: Dtype the scales are rounded to before the weights are quantized.
        bias: [N] float32, or None.
        input_scale: Any shape, float32 > 0; or None if the product is dynamic.
        division_dtype: What weight / scale is rounded to before it is rounded to an integer.
        mul: [K] float32, what each input channel is multiplied by first; None for nothing.

    Returns:
        [N, K] int8 and [N, 1] float32.
    """
    has_kernel = has_rows_kernel(weight_NK)
    if mul is not None and not has_kernel:
        weight_NK, mul = weight_NK.float() * mul, None
    lo_N1, hi_N1 = (-(hi := row_absmax(weight_NK, mul)), hi) if has_kernel else extremes(weight_NK, PerChannel())
    if bias is not None and input_scale is not None:
        hi_N1 = torch.maximum(hi_N1, 127 * bias.abs()[:, None] / (input_scale.amin() * _MAX_BIAS_STEPS))
    qparams = choose_qparams(lo_N1, hi_N1, symmetric=True, deploy_dtype=deploy_dtype)
    return quantized_rows(
        weight_NK, qparams.scale, mul, qmin=-127, qmax=127, division_dtype=division_dtype
    ), qparams.scale


def quantized_rows(
    weight_NK: Tensor,
    scale_N1: Tensor,
    mul: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    division_dtype: DeployDtype = "float32",
) -> Tensor:
    """Return clamp(round(w m / s), qmin, qmax), [N, K] int8: in one pass where there is a kernel, else by blocks.

    Args:
        weight_NK: [N, K] in a float dtype.
        scale_N1: [N, 1] float32 > 0.
        mul: [K] float32, or None.
        qmin: Lowest code.
        qmax: Largest code.
        division_dtype: What w m / s is rounded to before it is rounded to an integer.
    """
    if division_dtype == "float32" and has_rows_kernel(weight_NK):
        return quantize_rows(weight_NK, scale_N1, mul, qmin=qmin, qmax=qmax)
    dtype: torch.dtype = getattr(torch, division_dtype)
    weight_q_NK = torch.empty(weight_NK.shape, dtype=torch.int8, device=weight_NK.device)
    for rows in row_blocks(weight_NK):
        block = weight_NK[rows] if mul is None else weight_NK[rows].float() * mul
        qparams = QParams(scale_N1[rows], torch.zeros_like(scale_N1[rows]))
        weight_q_NK[rows] = quantize(block, qparams, qmin=qmin, qmax=qmax, division_dtype=dtype)
    return weight_q_NK


def static_constants(
    weight_q_NK: Tensor,
    weight_scale_N1: Tensor,
    bias: Tensor | None,
    input_qparams: QParams,
    deploy_dtype: DeployDtype = "float32",
) -> tuple[Tensor, Tensor]:
    """Return what a static product adds to and multiplies its int32 accumulator by.

    Args:
        weight_q_NK: [N, K] int8.
        weight_scale_N1: [N, 1] float32.
        bias: [N] float32, or None.
        input_qparams: Scale and zero point, [1] or [T, 1] float32.
        deploy_dtype: Dtype of the product; for float16 deq_scale is rounded to 11 significant bits. The operator cuts
            off all others (`npu_trans_quant_param`), which would make every output too small by 2^-11 on average.

    Returns:
        deq_scale [N] or [T, N] float32 and quant_bias [N] or [T, N] int32. The bias is rounded in float64, because
        z * sum_k W_q exceeds float32's 24 bits from K = 1040 on.
    """
    deq_scale = input_qparams.scale * weight_scale_N1[:, 0]
    if deploy_dtype == "float16":
        deq_scale = _to_11_bits(deq_scale)
    bias_steps = 0.0 if bias is None else bias.double() / deq_scale.double()
    quant_bias = torch.round(bias_steps - input_qparams.zero_point.double() * _row_sums(weight_q_NK))
    return deq_scale, quant_bias.to(torch.int32)


def _row_sums(weight_q_NK: Tensor) -> Tensor:
    """Return the sum of each row, [N] float64, exactly."""
    if sums_rows(weight_q_NK):
        return row_sums(weight_q_NK).double()
    # Float sums of a block of rows at a time are exact below 2^24, and many times faster than PyTorch's sums of int8.
    dtype = torch.float32 if weight_q_NK.shape[1] <= _EXACT_FLOAT_SUM else torch.float64
    return torch.cat([weight_q_NK[rows].to(dtype).sum(dim=1) for rows in row_blocks(weight_q_NK)]).double()


def dequantize_weight(weight_q: Tensor, weight_scale: Tensor) -> Tensor:
    """Return what the integers of a weight stand for.

    Args:
        weight_q: [N, K] int8.
        weight_scale: [N, G] float32: one scale for each of G runs of K / G input channels, G = 1 per output channel.

    Returns:
        [N, K] float32.
    """
    num_rows, num_groups = weight_scale.shape
    return (weight_q.float().reshape(num_rows, num_groups, -1) * weight_scale[..., None]).reshape(weight_q.shape)


def weight_specs(rows: int, columns: int) -> dict[str, Spec]:
    """Return dtype and shape of the weights of N output and K input channels that are quantized per channel."""
    return {"weight": (torch.int8, (rows, columns)), "weight_scale": (torch.float32, (rows, 1))}


def static_specs(rows: int, table: tuple[int, ...]) -> dict[str, Spec]:
    """Return dtype and shape of what a static product needs besides weights.

    Args:
        rows: N, output channels.
        table: () for one range, (T,) for one per denoising step.
    """
    return {
        "input_scale": (torch.float32, (*table, 1)),
        "input_offset": (torch.float32, (*table, 1)),
        "deq_scale": (torch.float32, (*table, rows)),
        "quant_bias": (torch.int32, (*table, rows)),
    }


def _to_11_bits(scale: Tensor) -> Tensor:
    """Round positive float32 to a fraction of 10 bits: add half of what the 13 lowest bits hold, then clear them."""
    bits = scale.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
