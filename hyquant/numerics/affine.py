"""Affine quantization of tensors to int8 codes: x ≈ (q - zero_point) * scale, in float32, rounding half to even.

Source: Jacob et al., arXiv:1712.05877, eq. 1; the same formula as the ONNX QuantizeLinear operator.
"""

import torch
from torch import Tensor

from hyquant.numerics.qparams import QParams


def quantize(
    x: Tensor, qparams: QParams, *, qmin: int = -128, qmax: int = 127, division_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return q = clamp(round(x / scale + zero_point), qmin, qmax) as int8.

    Args:
        x: Any shape and float dtype.
        qparams: Scale and zero point; broadcast against x.
        qmin: Lowest code; -127 for weights, so that a weight and its negative quantize alike.
        qmax: Largest code; 7 for int4.
        division_dtype: What x / scale is rounded to; a dtype of few bits moves codes by up to one.
    """
    quotient = (x.float() / qparams.scale).to(division_dtype).float()
    return quotient.add_(qparams.zero_point).round_().clamp_(qmin, qmax).to(torch.int8)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """Return (q - zero_point) * scale as float32, shaped as q."""
    return (q.float() - qparams.zero_point) * qparams.scale


def fake_quantize(x: Tensor, qparams: QParams, *, qmin: int = -128) -> Tensor:
    """Quantize and dequantize: the float32 value that int8 keeps of x."""
    return dequantize(quantize(x, qparams, qmin=qmin), qparams)
