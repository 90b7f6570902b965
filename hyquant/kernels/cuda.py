"""int8 Linears on NVIDIA cards by `torch._int_mm`, which cuBLASLt runs on the integer tensor cores.

Where a block is compiled, the operators around the product become one loop before it and one after it. In eager mode
two Triton kernels do the same (`hyquant.kernels.cuda_rows`), or, without triton, one torch operator after the other.

cuBLASLt takes more than 16 rows, and input and output channels that are multiples of 8: what is missing is filled up
with zeros, which add nothing to any sum. Source: the checks of `_int_mm_cuda` in ATen/native/cuda/Blas.cpp.

M rows   K input channels   N output channels
"""

import importlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hyquant.kernels.base import MatmulKernel
from hyquant.latency_report import KernelKind

_LEAST_ROWS = 17
_MULTIPLE = 8
_TURING = (7, 5)


def padded_weight(weight: Tensor) -> Tensor:
    """Return an [N, K] int8 weight with both sizes filled up to multiples of 8; itself if they are."""
    outputs, inputs = weight.shape
    return _filled(weight, outputs + -outputs % _MULTIPLE, inputs + -inputs % _MULTIPLE)


def _filled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Return a matrix filled up with zeros; itself if it has that size, where `pad` would copy."""
    missing = (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    return F.pad(matrix, missing) if any(missing) else matrix


def padded_int_mm(q: Tensor, weight: Tensor, num_outputs: int) -> Tensor:
    """Return q @ weight^T in int32.

    Args:
        q: [M, K] int8.
        weight: What `padded_weight` gave.
        num_outputs: N.
    """
    filled = _filled(q, *_padded_size(q, weight))
    return torch._int_mm(filled, weight.t())[: q.shape[0], :num_outputs]


def has_integer_cores(device: torch.device) -> bool:
    """Return whether this is an NVIDIA card of Turing (7.5) or later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= _TURING


@cache
def row_kernels() -> Any:
    """Return `hyquant.kernels.cuda_rows`, or None without triton or the C compiler that it builds launchers with."""
    has_compiler = "CC" in os.environ or any(shutil.which(name) for name in ("gcc", "clang"))
    if not has_compiler or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("hyquant.kernels.cuda_rows")


BY_OPERATORS = MatmulKernel(
    name="cuda_int_mm", kind="native", int_mm=padded_int_mm, runs_on=has_integer_cores, pack=padded_weight
)
"""The kernel as torch operators only, which `torch.compile` fuses."""


@dataclass(frozen=True)
class CudaKernel:
    """The kernel "cuda_int_mm"."""

    name: str = "cuda_int_mm"
    kind: KernelKind = "native"

    def is_available(self, device: torch.device) -> bool:
        """Return whether the product runs on this device of this machine."""
        return has_integer_cores(device)

    def prepare(self, weight: Tensor) -> Tensor:
        """Return an [N, K] int8 weight with both sizes filled up to multiples of 8."""
        return padded_weight(weight)

    def static(
        self,
        x: Tensor,
        operand: Tensor,
        *,
        input_scale: Tensor,
        input_offset: Tensor,
        deq_scale: Tensor,
        quant_bias: Tensor,
        mul_scale: Tensor | None,
    ) -> Tensor:
        """Apply a Linear whose input range is fixed."""
        rows = _row_kernels_for(x)
        if rows is None:
            return BY_OPERATORS.static(
                x,
                operand,
                input_scale=input_scale,
                input_offset=input_offset,
                deq_scale=deq_scale,
                quant_bias=quant_bias,
                mul_scale=mul_scale,
            )
        x_MK = x.reshape(-1, x.shape[-1])
        q, _ = rows.quantize_rows(
            x_MK,
            size=_padded_size(x_MK, operand),
            mul_scale=mul_scale,
            input_scale=input_scale,
            input_offset=input_offset,
        )
        y = rows.dequantize_rows(
            torch._int_mm(q, operand.t()),
            (x_MK.shape[0], deq_scale.shape[0]),
            x.dtype,
            out_scale=deq_scale,
            quant_bias=quant_bias,
        )
        return _shaped_as(x, y)

    def dynamic(
        self,
        x: Tensor,
        operand: Tensor,
        *,
        weight_scale: Tensor,
        bias: Tensor | None,
        mul_scale: Tensor | None,
        largest_code: int = 127,
    ) -> Tensor:
        """Apply a Linear that takes the range of each token."""
        rows = _row_kernels_for(x)
        if rows is None:
            return BY_OPERATORS.dynamic(
                x,
                operand,
                weight_scale=weight_scale,
                bias=bias,
                mul_scale=mul_scale,
                largest_code=largest_code,
            )
        x_MK = x.reshape(-1, x.shape[-1])
        q, row_scale = rows.quantize_rows(
            x_MK, size=_padded_size(x_MK, operand), mul_scale=mul_scale, largest_code=largest_code
        )
        y = rows.dequantize_rows(
            torch._int_mm(q, operand.t()),
            (x_MK.shape[0], weight_scale.shape[0]),
            x.dtype,
            out_scale=weight_scale[:, 0],
            row_scale=row_scale,
            bias=bias,
        )
        return _shaped_as(x, y)


def _row_kernels_for(x: Tensor) -> Any:
    """Return the Triton kernels for an input, or None where operators do the work."""
    return None if torch.compiler.is_compiling() or x.numel() == 0 else row_kernels()


def _padded_size(x_MK: Tensor, operand: Tensor) -> tuple[int, int]:
    return max(x_MK.shape[0], _LEAST_ROWS), operand.shape[1]


def _shaped_as(x: Tensor, y_MN: Tensor) -> Tensor:
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[1])


CUDA_INT_MM = CudaKernel()
