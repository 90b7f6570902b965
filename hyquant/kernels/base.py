"""What a kernel is: an int8 Linear as it really runs, in its static and its dynamic form.

All kernels compute the same integers; the float arithmetic around them is float32 on every device:

    static    q = clamp(round(x m / s_x + z), -128, 127)      y = (q W_q^T + quant_bias) deq_scale
    dynamic   s_r = max_k |x_rk m_k| / c   q = round(x m / s_r)   y = (q W_q^T) s_r s_w + b

m is the smoothing multiplier (1 if absent), r a row (token), c the largest code: 127, or 7 for inputs of 4 bits. Codes
of int4, of inputs as of weights, are codes of int8, so they run on the same instructions. The product q W_q^T is exact
in int32. `round` is half to even; the result is cast to the input's dtype once, at the end. A vendor kernel may round
ties or the product x m differently: its integers may be one off, which no test should compare bit by bit.

M rows   K input channels   N output channels
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hyquant.latency_report import KernelKind

TINY = float(torch.finfo(torch.float32).tiny)


class Int8Linear(Protocol):
    """An entry of `KERNELS`. Inputs are [..., K] in any float dtype with any number of rows; outputs [..., N] in it."""

    @property
    def name(self) -> str:
        """Return the key in `KERNELS`."""
        ...

    @property
    def kind(self) -> KernelKind:
        """Return "native" if the product runs on integer hardware instructions, "simulated" if it runs in float."""
        ...

    def is_available(self, device: torch.device) -> bool:
        """Return whether it runs on this device of this machine."""
        ...

    def prepare(self, weight: Tensor) -> Tensor:
        """Return the int8 weight [N, K] in the layout the kernel multiplies by; may be the weight itself."""
        ...

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
        """Apply a Linear whose input range is fixed; tensors as in `hyquant.schemes.contract`, one table row."""
        ...

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
        """Apply a Linear that takes the range of each token; `largest_code` is what a token's largest value becomes."""
        ...


@dataclass(frozen=True)
class MatmulKernel:
    """A kernel made of torch operators around one exact integer matrix product.

    Attributes:
        name: Key in `KERNELS`.
        kind: How the product runs.
        int_mm: (q [M, K] int8, operand, N) -> [M, N] int32, exact for any M including 0.
        runs_on: Whether `int_mm` runs on a device of this machine.
        pack: weight [N, K] int8 -> operand; None if the weight itself is the operand.
    """

    name: str
    kind: KernelKind
    int_mm: Callable[[Tensor, Tensor, int], Tensor]
    runs_on: Callable[[torch.device], bool]
    pack: Callable[[Tensor], Tensor] | None = None

    def is_available(self, device: torch.device) -> bool:
        """Return whether the product runs on this device of this machine."""
        return self.runs_on(device)

    def prepare(self, weight: Tensor) -> Tensor:
        """Return the weight as `int_mm` takes it."""
        return weight if self.pack is None else self.pack(weight)

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
        """Apply a Linear whose input range is fixed; see the module's first formula."""
        q = (_rows(x, mul_scale) / input_scale + input_offset).round().clamp(-128, 127).to(torch.int8)
        num_outputs = deq_scale.shape[0]
        y = (self.int_mm(q, operand, num_outputs) + quant_bias).float() * deq_scale
        return y.to(x.dtype).reshape(*x.shape[:-1], num_outputs)

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
        """Apply a Linear that takes the range of each token; see the module's second formula."""
        q, row_scale = quantized_tokens(_rows(x, mul_scale), largest_code)
        num_outputs = weight_scale.shape[0]
        y = self.int_mm(q, operand, num_outputs).float() * row_scale * weight_scale[:, 0]
        if bias is not None:
            y = y + bias
        return y.to(x.dtype).reshape(*x.shape[:-1], num_outputs)


def quantized_tokens(rows: Tensor, largest_code: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes [M, K] of float32 rows [M, K], and the scale of each, [M, 1] float32."""
    # An all-zero row gets the smallest normal scale: its codes are 0 and nothing is divided by 0.
    row_scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=TINY * largest_code) / largest_code
    return (rows / row_scale).round().to(torch.int8), row_scale


def _rows(x: Tensor, mul_scale: Tensor | None) -> Tensor:
    """Return [M, K] float32, multiplied if the layer is smoothed."""
    rows = x.reshape(-1, x.shape[-1]).float()
    return rows if mul_scale is None else rows * mul_scale
