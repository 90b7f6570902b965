"""What quantization does to the output of a Linear under candidates of its smoothing scale: sums of squared errors.

Sums, not means or ratios: what these would be divided by is the same for all candidates, and sums of different calls
and ranks add up. Weights get one symmetric scale per row, absmax / 127. Products of int8 with int8 run on the kernel
that quantized layers run on. All float arithmetic is float32; squares of a row are summed in float32, rows in float64.

M rows (tokens)   C input channels   N output channels   P candidates
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hyquant.kernels.selection import LinearShape, kernel_for
from hyquant.numerics.qparams import QParams, choose_qparams
from hyquant.schemes.weights import dequantize_weight, quantize_weight, static_constants

_BLOCK_ELEMENTS = 2**24
"""Outputs that are held at a time: 64 MiB."""


def weight_errors(x_MC: Tensor, weight_NC: Tensor, scales_PC: Tensor) -> Tensor:
    """Return || x (Q(W s) / s - W)^T ||^2 for every scale: the weights are int8, the input stays as it is.

    Args:
        x_MC: [M, C] float32.
        weight_NC: [N, C] float32.
        scales_PC: [P, C] float32 > 0.

    Returns:
        [P] float64.
    """
    errors = []
    for scale_C in scales_PC:
        change_NC = dequantize_weight(*quantize_weight(weight_NC, "float32", mul=scale_C)) / scale_C - weight_NC
        blocks = (_squares(rows @ change_NC.t()) for rows in _row_blocks(x_MC, len(weight_NC)))
        errors.append(torch.stack(list(blocks)).sum())
    return torch.stack(errors)


def weight_and_input_errors(x_MC: Tensor, weight_NC: Tensor, scales_PC: Tensor, lo_C: Tensor, hi_C: Tensor) -> Tensor:
    """Return || Q(x / s) Q(W s)^T - x W^T ||^2 for every scale: the input is int8 per tensor, too.

    Args:
        x_MC: [M, C] float32.
        weight_NC: [N, C] float32.
        scales_PC: [P, C] float32 > 0.
        lo_C: [C] float32, smallest input per channel over everything that shares the input's scale and zero point.
        hi_C: [C] float32, largest.

    Returns:
        [P] float64.
    """
    kernel = kernel_for(weight_NC.device, LinearShape(*weight_NC.shape))
    errors = torch.zeros(len(scales_PC), dtype=torch.float64, device=x_MC.device)
    for rows in _row_blocks(x_MC, len(weight_NC)):
        expected = rows @ weight_NC.t()
        for index, scale_C in enumerate(scales_PC):
            input_qparams = _tensor_qparams(lo_C / scale_C, hi_C / scale_C)
            codes_NC, row_scale_N1 = quantize_weight(weight_NC, "float32", mul=scale_C)
            deq_scale, quant_bias = static_constants(codes_NC, row_scale_N1, None, input_qparams)
            actual = kernel.static(
                rows,
                kernel.prepare(codes_NC),
                input_scale=input_qparams.scale,
                input_offset=input_qparams.zero_point,
                deq_scale=deq_scale,
                quant_bias=quant_bias,
                mul_scale=1 / scale_C,
            )
            errors[index] += _squares(actual.sub_(expected))
    return errors


def _row_blocks(x_MC: Tensor, num_outputs: int) -> Iterator[Tensor]:
    return iter(torch.split(x_MC, max(1, _BLOCK_ELEMENTS // num_outputs)))


def _squares(error: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(error, dim=1)
    return norms.double().square().sum()


def _tensor_qparams(lo_C: Tensor, hi_C: Tensor) -> QParams:
    return choose_qparams(lo_C.amin()[None], hi_C.amax()[None], symmetric=False)
