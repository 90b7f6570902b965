"""The operators that the engine calls on the device, in numpy, with the documented dtypes as hard conditions.

Semantics are those of torch_npu's schemas and of the CANN operator pages. What a device would refuse or leave undefined
raises `RefusedByOperator`, so that a test never passes on a call that no device takes.

    m tokens   k input channels   n output channels   N heads   S tokens of a head   D head dim
"""

import numpy as np

from tests.reference.typed import Typed, cast

MATMUL_DTYPES = {
    # output: per-token scale given? -> dtypes of scale, dtypes of bias (None is always allowed)
    ("bfloat16", False): (("float32", "bfloat16"), ("int32", "bfloat16", "float32")),
    ("bfloat16", True): (("float32", "bfloat16"), ("int32", "bfloat16", "float32")),
    ("float16", False): (("int64", "float32"), ("int32",)),
    ("float16", True): (("float32",), ("int32", "float16", "float32")),
}
E4M3_LARGEST, E4M3_LEAST_EXPONENT, E4M3_FRACTION_BITS = 448.0, -6, 3


class RefusedByOperator(Exception):
    """A call outside the operator's documented table."""


def demand(condition: bool, operator: str, rule: str, found: object) -> None:
    """Raise unless a condition of an operator holds."""
    if not condition:
        raise RefusedByOperator(f"{operator} takes {rule}, but got {found}")


def npu_quantize(x: Typed, scales: Typed, zero_points: Typed, *, axis: int = -1) -> Typed:
    """Return int8 round(x / scales + zero_points), saturated; scales are one value or one per element of the axis."""
    for name, vector in (("scales", scales), ("zero_points", zero_points)):
        demand(vector.values.ndim == 1, "npu_quantize", f"1-D {name}", vector.shape)
        size = x.shape[axis]
        demand(vector.values.size in (1, size), "npu_quantize", f"1 or {size} {name}", vector.values.size)
    is_bfloat16 = x.dtype == "bfloat16"
    demand(x.dtype in ("bfloat16", "float16", "float32"), "npu_quantize", "a float x", x.dtype)
    demand(scales.dtype == ("bfloat16" if is_bfloat16 else "float32"), "npu_quantize", "scales for its x", scales.dtype)
    allowed = ("bfloat16",) if is_bfloat16 else ("int8", "uint8", "int32", "float32")
    demand(zero_points.dtype in allowed, "npu_quantize", f"zero_points in {allowed}", zero_points.dtype)
    codes = np.rint(x.values / scales.values + zero_points.values.astype(np.float32))
    return Typed(np.clip(codes, -128, 127).astype(np.int8), "int8")


def npu_dynamic_quant(x: Typed, *, dst: str = "int8") -> tuple[Typed, Typed]:
    """Return int8 or int4 codes and the float32 scale of every token, largest magnitude / 127 or / 7.

    On the device int4 codes come eight in an int32, so a token has a multiple of 8.
    """
    demand(x.dtype in ("bfloat16", "float16"), "npu_dynamic_quant", "bfloat16 or float16", x.dtype)
    demand(x.values.ndim >= 2, "npu_dynamic_quant", "at least 2 dimensions", x.shape)
    if dst == "int4":
        demand(x.shape[-1] % 8 == 0, "npu_dynamic_quant", "a multiple of 8 channels for int4", x.shape)
    scale = np.abs(x.values).max(axis=-1) / np.float32({"int8": 127, "int4": 7}[dst])
    divisor = np.where(scale > 0, scale, 1)[..., None]
    return Typed(np.rint(x.values / divisor).astype(np.int8), dst), Typed(scale, "float32")


def npu_quant_matmul(
    x1: Typed, x2: Typed, scale: Typed, *, pertoken_scale: Typed | None = None, bias: Typed | None = None, output: str
) -> Typed:
    """Return (x1 @ x2 [+ int32 bias]) * scale [* pertoken_scale] [+ float bias] in the output dtype.

    Args:
        x1: int8 [m, k], or int4.
        x2: int8 [k, n], or int4 like x1.
        scale: [n] or [1]; int64 holds the bits of a float32 in its low half.
        pertoken_scale: float32 [m].
        bias: [n].
        output: "bfloat16" or "float16".
    """
    name, (m, k), (k2, n) = "npu_quant_matmul", x1.shape, x2.shape
    operands = (x1.dtype, x2.dtype)
    demand(operands in (("int8", "int8"), ("int4", "int4")), name, "int8 or int4 operands", operands)
    demand(k == k2 and max(k, n) <= 65535, name, "equal k, last dimensions up to 65535", (x1.shape, x2.shape))
    scales, biases = MATMUL_DTYPES[output, pertoken_scale is not None]
    demand(scale.dtype in scales, name, f"a scale in {scales} for output {output}", scale.dtype)
    demand(scale.shape in ((n,), (1,)), name, f"a scale of shape ({n},) or (1,)", scale.shape)
    if pertoken_scale is not None:
        demand((pertoken_scale.dtype, pertoken_scale.shape) == ("float32", (m,)), name, "float32 [m]", pertoken_scale)
    if bias is not None:
        demand(bias.dtype in biases, name, f"a bias in {biases} for output {output}", bias.dtype)
        demand(bias.shape == (n,), name, f"a bias of shape ({n},)", bias.shape)

    total = x1.values.astype(np.float64) @ x2.values.astype(np.float64)  # integers below 2^53: exact
    if bias is not None and bias.dtype == "int32":
        total = total + bias.values
    demand(bool((np.abs(total) < 2**31).all()), name, "sums that fit int32", np.abs(total).max(initial=0))
    factor = scale.values
    if output == "float16" and pertoken_scale is None:
        factor = top_19_bits(scale)
    y = total.astype(np.float32) * factor
    if pertoken_scale is not None:
        y = y * pertoken_scale.values[:, None]
    if bias is not None and bias.is_float:
        y = y + bias.values
    return cast(y, output)


def npu_weight_quant_batchmatmul(x: Typed, weight: Typed, antiquant_scale: Typed, *, bias: Typed | None) -> Typed:
    """Return x @ (weight * antiquant_scale) + bias in x's dtype.

    Args:
        x: bfloat16 or float16 [m, k].
        weight: int8 or int4 [k, n].
        antiquant_scale: [1, n] in x's dtype.
        bias: [n], float32 for bfloat16 and float16 for float16.
    """
    name, (_, k), (k2, n) = "npu_weight_quant_batchmatmul", x.shape, weight.shape
    demand(x.dtype in ("bfloat16", "float16"), name, "bfloat16 or float16", x.dtype)
    demand(weight.dtype in ("int8", "int4") and k == k2, name, "an integer weight of equal k", (weight.dtype, k, k2))
    demand(antiquant_scale.dtype == x.dtype, name, "scales in the dtype of x", antiquant_scale.dtype)
    demand(antiquant_scale.shape == (1, n), name, f"scales of shape (1, {n})", antiquant_scale.shape)
    if bias is not None:
        wanted = "float32" if x.dtype == "bfloat16" else "float16"
        demand((bias.dtype, bias.shape) == (wanted, (n,)), name, f"a {wanted} bias [{n}]", (bias.dtype, bias.shape))
    y = x.values.astype(np.float64) @ (weight.values * antiquant_scale.values.astype(np.float64))
    return cast((y if bias is None else y + bias.values).astype(np.float32), x.dtype)


def npu_convert_weight_to_int4pack(weight: Typed) -> Typed:
    """Return an int8 weight as the same numbers in int4; eight of them along the last dimension share an int32."""
    name, values = "npu_convert_weight_to_int4pack", weight.values
    demand(values.shape[-1] % 8 == 0, name, "a last dimension that is a multiple of 8", values.shape)
    demand(bool(((values >= -8) & (values <= 7)).all()), name, "values in [-8, 7]", (values.min(), values.max()))
    return Typed(values, "int4")


def npu_trans_quant_param(scale: Typed) -> Typed:
    """Return int64: the float32 cut to its upper 19 bits in the low half, and bit 46 set; without an offset."""
    name = "npu_trans_quant_param"
    demand(scale.dtype == "float32", name, "a float32 scale", scale.dtype)
    demand(scale.values.ndim == 1, name, "a 1-D scale", scale.shape)
    bits = np.ascontiguousarray(scale.values).view(np.uint32) & np.uint32(0xFFFFE000)
    return Typed(bits.astype(np.int64) | (1 << 46), "int64")


def top_19_bits(scale: Typed) -> np.ndarray:
    """Return what a float16 output multiplies by: the float32 in the low half of an int64, or given, cut to 19 bits."""
    if scale.dtype == "int64":
        bits = (scale.values & 0xFFFFFFFF).astype(np.uint32)
    else:
        bits = np.ascontiguousarray(scale.values).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Round to float8 e4m3fn, ties to even, saturated at 448: 3 fraction bits, subnormal below 2^-6."""
    exponent = np.frexp(np.maximum(np.abs(x), 1e-30))[1] - 1
    step = np.exp2(np.maximum(exponent, E4M3_LEAST_EXPONENT) - E4M3_FRACTION_BITS).astype(np.float32)
    return np.clip(np.rint(x / step) * step, -E4M3_LARGEST, E4M3_LARGEST).astype(np.float32)


def npu_dynamic_block_quant(x: Typed, *, row_block: int, col_block: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Return float8 e4m3 values and float32 scales [N, S / row_block, D / col_block] of x [N, S, D], largest / 448."""
    demand(x.dtype in ("bfloat16", "float16"), "npu_dynamic_block_quant", "bfloat16 or float16", x.dtype)
    demand(x.values.ndim == 3, "npu_dynamic_block_quant", "[N, S, D]", x.shape)
    heads, tokens, width = x.shape
    values = np.zeros_like(x.values)
    scales = np.zeros((heads, -(-tokens // row_block), -(-width // col_block)), np.float32)
    for row in range(scales.shape[1]):
        for col in range(scales.shape[2]):
            block = np.s_[:, row * row_block : (row + 1) * row_block, col * col_block : (col + 1) * col_block]
            largest = np.abs(x.values[block]).max(axis=(1, 2))
            scale = np.where(largest > 0, largest / np.float32(E4M3_LARGEST), 1).astype(np.float32)
            scales[:, row, col] = scale
            values[block] = to_e4m3(x.values[block] / scale[:, None, None])
    return values, scales


def of_blocks(values: np.ndarray, scales: np.ndarray, *, row_block: int, col_block: int = 128) -> np.ndarray:
    """Multiply values [N, S, D] by the scale of their block."""
    whole = scales.repeat(row_block, axis=1).repeat(col_block, axis=2)
    return values * whole[:, : values.shape[1], : values.shape[2]]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return softmax(q k^T * factor) v of [N, S, D] in float32; factor is [N, 1, 1]."""
    scores = (q @ k.transpose(0, 2, 1)) * factor
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)) @ v
