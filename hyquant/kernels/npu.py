"""int8 Linears on Ascend by torch_npu's operators: one that quantizes, one that multiplies and dequantizes.

    dynamic   npu_dynamic_quant(x, smooth_scales=m) -> q, s_r   npu_quant_matmul(q, W^T, s_w, pertoken_scale=s_r, bias)
    static    npu_quantize(x m, s_x, z) -> q                    npu_quant_matmul(q, W^T, deq_scale, bias=quant_bias)

Inputs are worked on in bfloat16 or float16, which the operators take; float32 inputs are rounded to bfloat16 first, and
results are rounded to the working dtype by the operator. In float16 the static product keeps the upper 19 bits of
deq_scale. Ties of rounding are not specified, so codes may be one off those of other kernels. MindIE-SD calls the same
two operators.

Sources: torch_npu 2.14 operator schemas (npu_native_functions.yaml) and the CANN pages aclnnDynamicQuantV2,
aclnnAscendQuantV3 and aclnnQuantMatmulV4. Written from them and not run on hardware.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hyquant.errors import ConfigError
from hyquant.kernels.base import TINY
from hyquant.latency_report import KernelKind

NZ = "HYQUANT_NPU_NZ"
"""Environment variable that asks, by "1", for weights in the fractal format that the matrix unit reads directly."""

OPERATORS = ("npu_dynamic_quant", "npu_quantize", "npu_quant_matmul")
LARGEST_DIMENSION = 65535
"""Of channels that npu_quant_matmul takes."""

_FRACTAL_NZ = 29
_DTYPES = (torch.bfloat16, torch.float16)


@cache
def torch_npu() -> Any:
    """Return the package torch_npu, or None if it is missing, does not load or is too old."""
    if importlib.util.find_spec("torch_npu") is None:
        return None
    try:
        module = importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError):
        return None
    return module if all(hasattr(module, name) for name in OPERATORS) else None


@dataclass(frozen=True)
class NpuKernel:
    """The kernel "npu".

    Attributes:
        operators: Returns what has the operators as attributes, or None where there are none.
    """

    operators: Callable[[], Any] = torch_npu
    name: str = "npu"
    kind: KernelKind = "native"

    def is_available(self, device: torch.device) -> bool:
        """Return whether this is an NPU whose torch_npu has the operators."""
        return device.type == "npu" and self.operators() is not None

    def prepare(self, weight: Tensor) -> Tensor:
        """Return an [N, K] int8 weight as [K, N]: a view, or a copy in fractal format if `NZ` asks for it.

        Raises:
            ConfigError: If it has more channels than the operator takes.
        """
        if max(weight.shape) > LARGEST_DIMENSION:
            raise ConfigError(
                f"an int8 Linear on an NPU has at most {LARGEST_DIMENSION} channels on a side, but this one is "
                f"{weight.shape[1]} -> {weight.shape[0]}; exclude it, or force the kernel reference"
            )
        if os.environ.get(NZ) != "1":
            return weight.t()
        operand: Tensor = self.operators().npu_format_cast(weight.t().contiguous(), _FRACTAL_NZ)
        return operand

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
        rows = _rows(x)
        if len(rows) == 0:
            return x.new_empty((*x.shape[:-1], operand.shape[1]))
        if mul_scale is not None:
            rows = rows * mul_scale.to(rows.dtype)
        # bfloat16 rows want scales and offsets in bfloat16, which scales are rounded to anyway; float16 rows float32.
        dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
        q = self.operators().npu_quantize(
            rows, input_scale.to(dtype), input_offset.to(dtype), torch.qint8, axis=-1, div_mode=True
        )
        y = self.operators().npu_quant_matmul(q, operand, deq_scale, bias=quant_bias, output_dtype=rows.dtype)
        return _as_given(y, x)

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
        """Apply a Linear that takes the range of each token; codes of fewer bits are made by torch's own operators."""
        rows = _rows(x)
        if len(rows) == 0:
            return x.new_empty((*x.shape[:-1], operand.shape[1]))
        smooth = None if mul_scale is None else mul_scale.to(rows.dtype)
        if largest_code == 127:
            q, row_scale = self.operators().npu_dynamic_quant(rows, smooth_scales=smooth)
        else:
            q, row_scale = _quantized(rows if smooth is None else rows * smooth, largest_code)
        y = self.operators().npu_quant_matmul(
            q, operand, weight_scale[:, 0], pertoken_scale=row_scale, bias=bias, output_dtype=rows.dtype
        )
        return _as_given(y, x)


def _quantized(rows: Tensor, largest_code: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes [M, K] and the scale of each row, [M] float32."""
    values = rows.float()
    scale = values.abs().amax(dim=-1).clamp(min=TINY * largest_code) / largest_code
    return (values / scale[:, None]).round().to(torch.int8), scale


def _rows(x: Tensor) -> Tensor:
    """Return [M, K] in a dtype that the operators take."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.dtype in _DTYPES else rows.to(torch.bfloat16)


def _as_given(y: Tensor, x: Tensor) -> Tensor:
    """Return [M, N] with the leading dimensions and the dtype of the input."""
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


NPU = NpuKernel()
