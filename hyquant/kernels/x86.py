"""int8 Linears in C for x86-64 CPUs: quantize, multiply exactly, dequantize, in one call.

One source, `int8_linear_x86.c`, is built for two instruction sets (`hyquant.kernels.x86_build`). On AVX512-VNNI it does
in one call what takes PyTorch a chain of operators and an int32 result in memory. On AVX2 PyTorch has nothing to offer:
`torch._int_mm` runs scalar loops, and oneDNN's byte product (vpmaddubsw) saturates its 16-bit sums, which on full-range
operands is wrong by 18 % in relative L2. Without a compiler other kernels give the same integers.

M rows   K input channels   N output channels
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyquant.kernels.base import TINY
from hyquant.kernels.x86_build import AVX2_BUILD, BUILDS, VNNI_BUILD, address
from hyquant.latency_report import KernelKind

_DIRECT_DTYPES = (torch.float32, torch.bfloat16)

_OPERATORS = torch.library.Library("hyquant", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "int8_linear_x86(str name, Tensor x, Tensor packed, Tensor out_scale, Tensor? input_scale, Tensor? input_offset,"
    " Tensor? quant_bias, Tensor? bias, Tensor? mul_scale, int largest_code) -> Tensor"
)


@torch.library.impl(_OPERATORS, "int8_linear_x86", "CPU")
def _int8_linear(
    name: str,
    x: Tensor,
    packed: Tensor,
    out_scale: Tensor,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    quant_bias: Tensor | None,
    bias: Tensor | None,
    mul_scale: Tensor | None,
    largest_code: int,
) -> Tensor:
    rows = x.contiguous()
    (num_rows, num_inputs), num_outputs = rows.shape, out_scale.numel()
    y = torch.empty((num_rows, num_outputs), dtype=x.dtype)
    failed = (
        BUILDS[name]
        .library()
        .hyq_int8_linear(
            *(address(rows, x.dtype), address(packed, torch.int8), address(y, x.dtype)),
            *(num_rows, num_outputs, num_inputs),
            *(address(tensor, torch.float32) for tensor in (mul_scale, input_scale, input_offset, out_scale)),
            *(address(quant_bias, torch.int32), address(bias, torch.float32)),
            *(largest_code, TINY, x.dtype == torch.bfloat16, torch.get_num_threads()),
        )
    )
    if failed:
        raise torch.OutOfMemoryError(f"an int8 Linear needs {num_rows} x {num_inputs} codes, but malloc refused.")
    return y


@torch.library.register_fake("hyquant::int8_linear_x86")  # type: ignore[untyped-decorator]
def _int8_linear_fake(name: str, x: Tensor, packed: Tensor, out_scale: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], out_scale.numel()))


@dataclass(frozen=True)
class X86Kernel:
    """`int8_linear_x86.c`, built for one instruction set.

    Attributes:
        name: Key in `KERNELS`, that of the build.
    """

    name: str
    kind: KernelKind = "native"

    def is_available(self, device: torch.device) -> bool:
        """Return whether this is a CPU that has the instructions and the C code is built or can be."""
        return BUILDS[self.name].is_available(device)

    def prepare(self, weight: Tensor) -> Tensor:
        """Return an [N, K] int8 weight as the panels that the C code reads, as bytes: K bytes a row, on AVX2 2 K."""
        library = BUILDS[self.name].library()
        num_outputs, num_inputs = weight.shape
        packed = torch.empty(library.hyq_packed_bytes(num_outputs, num_inputs), dtype=torch.int8)
        rows = weight.contiguous()  # by name, so that it is there while C reads it
        library.hyq_pack_weight(address(rows, torch.int8), address(packed, torch.int8), num_outputs, num_inputs)
        return packed

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
        return self._apply(x, operand, deq_scale, input_scale, input_offset, quant_bias, None, mul_scale, 127)

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
        return self._apply(x, operand, weight_scale, None, None, None, bias, mul_scale, largest_code)

    def _apply(self, x: Tensor, operand: Tensor, out_scale: Tensor, *others: Tensor | int | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.dtype not in _DIRECT_DTYPES:
            rows = rows.float()
        y: Tensor = torch.ops.hyquant.int8_linear_x86(self.name, rows, operand, out_scale, *others)
        return y.to(x.dtype).reshape(*x.shape[:-1], out_scale.numel())


AVX2 = X86Kernel(AVX2_BUILD.name)
VNNI = X86Kernel(VNNI_BUILD.name)
