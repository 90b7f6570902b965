"""What is around the integer product on an NVIDIA card, as one Triton kernel before it and one after it.

In eager mode torch runs that arithmetic operator by operator, each with a float32 or int32 copy of the whole matrix: at
118 800 tokens and 21 504 channels 10 GB each. Here a matrix is read once, and nothing but codes, scales and results is
written. Formulas, order of operations and rounding are those of `hyquant.kernels.base`, so results are the same bits.

Importing this module needs triton; `hyquant.kernels.cuda` does without it where it is missing.

M rows   K input channels   N output channels
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyquant.kernels.base import TINY

_COLUMNS = 1024
"""How many columns of a row one program has in registers at a time."""


@triton.jit
def quantize_rows_kernel(
    x,
    mul_scale,
    input_scale,
    input_offset,
    q,
    row_scale,
    num_rows,
    num_inputs,
    x_stride,
    q_stride,
    largest_code,
    smallest,
    HAS_MUL: tl.constexpr,
    IS_STATIC: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the codes of one row, and its scale unless the range is fixed; what x does not have becomes 0."""
    row = tl.program_id(0).to(tl.int64)  # rows times channels exceed 32 bits
    x_row, q_row, is_row = x + row * x_stride, q + row * q_stride, row < num_rows
    if IS_STATIC:
        scale, offset = tl.load(input_scale), tl.load(input_offset)
    else:
        largest = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, num_inputs, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            is_input = (column < num_inputs) & is_row
            value = tl.load(x_row + column, mask=is_input, other=0.0).to(tl.float32)
            if HAS_MUL:
                value = value * tl.load(mul_scale + column, mask=column < num_inputs, other=0.0)
            largest = tl.maximum(largest, tl.abs(value))
        scale = tl.math.div_rn(tl.maximum(tl.max(largest, axis=0), smallest), largest_code)
        offset = 0.0
        tl.store(row_scale + row, scale, mask=is_row)
    for start in range(0, q_stride, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_input = (column < num_inputs) & is_row
        value = tl.load(x_row + column, mask=is_input, other=0.0).to(tl.float32)
        if HAS_MUL:
            value = value * tl.load(mul_scale + column, mask=column < num_inputs, other=0.0)
        code = tl.minimum(tl.maximum(tl.math.div_rn(value, scale) + offset, -128.0), 127.0)
        # Above 2^23 a float32 has no fraction: adding 1.5 * 2^23 rounds half to even.
        code = (code + 12582912.0) - 12582912.0
        tl.store(q_row + column, tl.where(is_input, code, 0.0).to(tl.int8), mask=column < q_stride)


@triton.jit
def dequantize_rows_kernel(
    product,
    row_scale,
    out_scale,
    quant_bias,
    bias,
    y,
    num_outputs,
    product_stride,
    HAS_BIAS: tl.constexpr,
    IS_STATIC: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write some columns of one row of the result."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_output = column < num_outputs
    total = tl.load(product + row * product_stride + column, mask=is_output, other=0)
    factor = tl.load(out_scale + column, mask=is_output, other=0.0)
    if IS_STATIC:
        value = (total + tl.load(quant_bias + column, mask=is_output, other=0)).to(tl.float32) * factor
    else:
        value = total.to(tl.float32) * tl.load(row_scale + row) * factor
        if HAS_BIAS:
            value = value + tl.load(bias + column, mask=is_output, other=0.0)
    tl.store(y + row * num_outputs + column, value.to(y.dtype.element_ty), mask=is_output)


def quantize_rows(
    x: Tensor,
    *,
    size: tuple[int, int],
    mul_scale: Tensor | None,
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
    largest_code: int = 127,
) -> tuple[Tensor, Tensor]:
    """Return int8 codes filled up with zeros to `size`, and the scale of each row.

    Args:
        x: [M, K], any float dtype.
        size: Rows and columns of the codes, at least M and K.
        mul_scale: [K] float32 or None, what x is multiplied by first.
        input_scale: [1] float32, of the fixed range; None where each row has its own.
        input_offset: [1] float32, of the fixed range.
        largest_code: What a row's largest value becomes where it has its own range.

    Returns:
        [size] int8 and [M] float32; the scales are undefined where the range is fixed.
    """
    rows = x if x.stride(1) == 1 else x.contiguous()
    q = torch.empty(size, dtype=torch.int8, device=x.device)
    row_scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(size[0],)](
            rows,
            mul_scale,
            input_scale,
            input_offset,
            q,
            row_scale,
            *x.shape,
            rows.stride(0),
            size[1],
            float(largest_code),
            TINY * largest_code,
            HAS_MUL=mul_scale is not None,
            IS_STATIC=input_scale is not None,
            COLUMNS=_COLUMNS,
            enable_fp_fusion=False,
        )
    return q, row_scale


def dequantize_rows(
    product: Tensor,
    size: tuple[int, int],
    dtype: torch.dtype,
    *,
    out_scale: Tensor,
    row_scale: Tensor | None = None,
    quant_bias: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the float result of an integer product.

    Args:
        product: int32, at least [M, N].
        size: M and N.
        dtype: Of the result.
        out_scale: [N] float32: weight scales, or deq_scale where `quant_bias` is given.
        row_scale: [M] float32; needed without `quant_bias`.
        quant_bias: [N] int32, what is added to the product of a fixed range.
        bias: [N] float32 or None, what is added to the result of rows with their own range.
    """
    y = torch.empty(size, dtype=dtype, device=product.device)
    with torch.cuda.device_of(product):
        dequantize_rows_kernel[(size[0], triton.cdiv(size[1], _COLUMNS))](
            product,
            row_scale,
            out_scale,
            quant_bias,
            bias,
            y,
            size[1],
            product.stride(0),
            HAS_BIAS=bias is not None,
            IS_STATIC=quant_bias is not None,
            COLUMNS=_COLUMNS,
            enable_fp_fusion=False,
        )
    return y
