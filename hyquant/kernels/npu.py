"""int8 Linears on Ascend by torch_npu's operators: one that quantizes, one that multiplies and dequantizes.

    dynamic   npu_dynamic_quant(x, smooth_scales=m) -> q, s_r   npu_quant_matmul(q, W^T, s_w, pertoken_scale=s_r, bias)
    static    npu_quantize(x m, s_x, z) -> q                    npu_quant_matmul(q, W^T, deq_scale, bias=quant_bias)

Products are written in the input's dtype, for float32 inputs in bfloat16; npu_dynamic_quant takes none but bfloat16 and
float16, so it gets float32 inputs rounded to bfloat16. For float16 the static product takes deq_scale as what
npu_trans_quant_param makes of it, 19 bits wide. Ties of rounding are not specified, so codes may be one off those of
other kernels. MindIE-SD calls the same operators.

They are called as `torch.ops.npu`, which is what torch_npu exports under its own name: torch.compile traces that
without a break, and importing this module does not import torch_npu.

Sources: torch_npu 2.13 and 2.14 operator schemas (npu_native_functions_by_codegen.yaml) and the CANN pages
aclnnDynamicQuantV2, aclnnAscendQuantV3, aclnnTransQuantParamV2 and aclnnQuantMatmulV4. Written from them and not run on
hardware.

M rows   K input channels   N output channels
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyquant.errors import ConfigError
from hyquant.kernels.base import quantized_tokens
from hyquant.latency_report import KernelKind

NZ = "HYQUANT_NPU_NZ"
"""Environment variable that asks, by "1", for weights in the fractal format that the matrix unit reads directly.

torch_npu makes such tensors only while `torch.npu.config.allow_internal_format` is True.
"""

OPERATORS = ("npu_dynamic_quant", "npu_quantize", "npu_quant_matmul", "npu_trans_quant_param", "npu_format_cast")
LARGEST_DIMENSION = 65535
"""Of channels that npu_quant_matmul takes."""

_FRACTAL_NZ = 29


@dataclass(frozen=True)
class NpuKernel:
    """The kernel "npu".

    Attributes:
        operators: What has the operators as attributes.
    """

    operators: Any = torch.ops.npu
    name: str = "npu"
    kind: KernelKind = "native"

    def is_available(self, device: torch.device) -> bool:
        """Return whether this is an NPU whose torch_npu has the operators."""
        return device.type == "npu" and all(hasattr(self.operators, name) for name in OPERATORS)

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
        operand: Tensor = self.operators.npu_format_cast(weight.t().contiguous(), _FRACTAL_NZ)
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
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == 0:
            return x.new_empty((*x.shape[:-1], operand.shape[1]))
        if mul_scale is not None:
            rows = rows * mul_scale.to(rows.dtype)
        # The operator takes bfloat16 rows with a range in bfloat16, which input_scale is rounded to in such a model.
        dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
        q = self.operators.npu_quantize(
            rows, input_scale.to(dtype), input_offset.to(dtype), torch.qint8, axis=-1, div_mode=True
        )
        is_half = x.dtype == torch.float16
        scale = self.operators.npu_trans_quant_param(deq_scale) if is_half else deq_scale
        y = self.operators.npu_quant_matmul(q, operand, scale, bias=quant_bias, output_dtype=_product_dtype(x))
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
        rows = x.reshape(-1, x.shape[-1]).to(_product_dtype(x))
        if len(rows) == 0:
            return x.new_empty((*x.shape[:-1], operand.shape[1]))
        smooth = None if mul_scale is None else mul_scale.to(rows.dtype)
        if largest_code == 127:
            q, row_scale = self.operators.npu_dynamic_quant(rows, smooth_scales=smooth)
        else:
            q, scales = quantized_tokens((rows if smooth is None else rows * smooth).float(), largest_code)
            row_scale = scales[:, 0]
        y = self.operators.npu_quant_matmul(
            q, operand, weight_scale[:, 0], pertoken_scale=row_scale, bias=bias, output_dtype=rows.dtype
        )
        return _as_given(y, x)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that npu_quant_matmul writes for an input."""
    return torch.float16 if x.dtype == torch.float16 else torch.bfloat16


def _as_given(y: Tensor, x: Tensor) -> Tensor:
    """Return [M, N] with the leading dimensions and the dtype of the input."""
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


NPU = NpuKernel()
