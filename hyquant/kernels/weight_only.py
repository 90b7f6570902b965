"""Linears of which only the weights are integers: these are turned back into floats, and the product is one of floats.

    y = x m W~^T + b          W~[n, k] = W_q[n, k] s_w[n, group of k]

W~ is rounded to the input's dtype and the product is torch's own in it, as `npu_weight_quant_batchmatmul` multiplies on
an NPU. No integers are multiplied, so it is labelled simulated: it takes the float layer's time and that of W~.

What torch has for CPUs, `aten::_weight_int8pack_mm` and `aten::_weight_int4pack_mm_for_cpu`, gives the same numbers and
is made for a few tokens: docs/decisions/0017-weight-only-and-lower-bits.md says what it takes for a thousand.
"""

from torch import Tensor
from torch.nn import functional as F

from hyquant.schemes.weights import dequantize_weight

NAME = "dequantized"


def weight_only_linear(
    x: Tensor, weight: Tensor, *, weight_scale: Tensor, bias: Tensor | None, mul_scale: Tensor | None
) -> Tensor:
    """Apply a Linear with integer weights to float inputs.

    Args:
        x: [..., K], any float dtype.
        weight: [N, K] int8.
        weight_scale: [N, G] float32, as `hyquant.schemes.weights.dequantize_weight` takes it.
        bias: [N] float32, or None.
        mul_scale: [K] float32, what x is multiplied by; None if it is not.

    Returns:
        [..., N] in x's dtype.
    """
    rows = x if mul_scale is None else (x.float() * mul_scale).to(x.dtype)
    floats = dequantize_weight(weight, weight_scale).to(x.dtype)
    return F.linear(rows, floats, None if bias is None else bias.to(x.dtype))
