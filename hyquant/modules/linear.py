"""QuantLinear: a Linear that holds int8 weights and runs an int8 kernel.

The members of a fused group read the same input, so they share one `InputParams` module (input scale, offset,
multiplier): a compiler sees the same tensors and quantizes the input once. What depends on the denoising step lives in
fixed buffers that `set_step` refills, and whether the step is static is a Python bool: under `torch.compile` that makes
two variants of a block, and no step index ever enters a graph.

N output channels   K input channels   T table rows
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hyquant.errors import CalibrationError, ConfigError
from hyquant.kernels import kernel_for
from hyquant.latency_report import KernelKind
from hyquant.schemes import SCHEMES
from hyquant.schemes.contract import LayerTensors


class InputParams(nn.Module):
    """How the input of a layer group is quantized; shared by the group's members.

    Attributes:
        scale, offset: [1] float32, of the current step; None without a stored range.
        scale_table, offset_table: [T, 1] float32; None unless there is one range per step.
        mul_scale: [K] float32 or None, what the input is multiplied by first.
    """

    scale: Tensor | None
    offset: Tensor | None
    scale_table: Tensor | None
    offset_table: Tensor | None
    mul_scale: Tensor | None

    def __init__(self, tensors: LayerTensors, *, is_per_step: bool) -> None:
        super().__init__()
        scale, offset = tensors.get("input_scale"), tensors.get("input_offset")
        for name, tensor in (("scale", scale), ("offset", offset)):
            self.register_buffer(f"{name}_table", tensor if is_per_step else None)
            self.register_buffer(name, tensor[0].clone() if is_per_step and tensor is not None else tensor)
        self.register_buffer("mul_scale", tensors.get("mul_scale"))

    def set_row(self, row: int) -> None:
        """Make one row of the tables the current one."""
        _refill(self.scale, self.scale_table, row)
        _refill(self.offset, self.offset_table, row)

    def step_buffers(self) -> tuple[Tensor, ...]:
        """Return the buffers that `set_row` writes to."""
        return _written(self.scale, self.scale_table) + _written(self.offset, self.offset_table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "InputParams":
        super()._apply(_moves_only(fn), recurse)  # type: ignore[no-untyped-call]
        return self


class QuantLinear(nn.Module):
    """An int8 Linear in place of a float one; built by `quant_linears`.

    Inputs are [..., K] in any float dtype, outputs [..., N] in the same; see `hyquant.kernels.base` for the arithmetic.
    Moving it moves its tensors; casting it (`.to(dtype)`, `.half()`) leaves them as they are, because int8 codes and
    scales belong together.

    Attributes:
        scheme: The scheme's name.
        timestep_sep: First static step of `w8a8_timestep`; 0 otherwise.
        is_static_step: Whether the stored range is used; None before the clock of a `w8a8_timestep` layer is set.
        weight: [N, K] int8.
        operand: The weight in the kernel's layout; the weight itself unless the kernel packs.
    """

    weight: Tensor
    operand: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None
    deq_scale: Tensor | None
    quant_bias: Tensor | None
    deq_scale_table: Tensor | None
    quant_bias_table: Tensor | None

    def __init__(self, tensors: LayerTensors, input_params: InputParams, *, scheme: str, timestep_sep: int = 0) -> None:
        super().__init__()
        self.scheme = scheme
        self.timestep_sep = timestep_sep
        is_per_step = SCHEMES[scheme].is_per_step
        self.is_static_step: bool | None = None if is_per_step else SCHEMES[scheme].needs_range
        self.input = input_params
        for name in ("weight", "weight_scale", "bias"):
            self.register_buffer(name, tensors.get(name))
        for name in ("deq_scale", "quant_bias"):
            tensor = tensors.get(name)
            self.register_buffer(f"{name}_table", tensor if is_per_step else None)
            self.register_buffer(name, tensor[0].clone() if is_per_step and tensor is not None else tensor)
        self.out_features, self.in_features = self.weight.shape
        self.kernel = kernel_for(self.weight.device)
        self.register_buffer("operand", self.kernel.prepare(self.weight), persistent=False)

    @property
    def kernel_kind(self) -> KernelKind:
        """Return how the matrix product runs here: "native" or "simulated"."""
        return self.kernel.kind

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., K], any float dtype, any number of rows.

        Returns:
            [..., N] in x's dtype.

        Raises:
            ConfigError: If x is not float: modules that cast their input to the dtype of this weight get int8.
        """
        if not x.is_floating_point():
            raise ConfigError(
                f"the input of a quantized layer must be float, but is {x.dtype}: what comes before casts to the dtype "
                "of the layer's weight, as timestep embedders do; exclude the layer."
            )
        params = self.input
        if self.is_static_step is None:
            raise CalibrationError(
                "a w8a8_timestep layer must know the denoising step, but its clock was never set; "
                "call clock.set(step_index) before the forward."
            )
        if self.is_static_step:
            assert params.scale is not None
            assert params.offset is not None
            assert self.deq_scale is not None
            assert self.quant_bias is not None
            return self.kernel.static(
                x,
                self.operand,
                input_scale=params.scale,
                input_offset=params.offset,
                deq_scale=self.deq_scale,
                quant_bias=self.quant_bias,
                mul_scale=params.mul_scale,
            )
        assert self.weight_scale is not None
        return self.kernel.dynamic(
            x, self.operand, weight_scale=self.weight_scale, bias=self.bias, mul_scale=params.mul_scale
        )

    def set_step(self, step_index: int) -> None:
        """Use the mode and the table row of a denoising step; only `w8a8_timestep` layers depend on it.

        Raises:
            CalibrationError: If a static step has no table row.
        """
        if self.deq_scale_table is None:
            return
        self.is_static_step = step_index >= self.timestep_sep
        if not self.is_static_step:
            return
        num_rows = self.deq_scale_table.shape[0]
        if step_index >= num_rows:
            raise CalibrationError(
                f"a static step must have a calibrated range, but step {step_index} is beyond the {num_rows} rows; "
                "quantize with the number of steps that runs."
            )
        self.input.set_row(step_index)
        _refill(self.deq_scale, self.deq_scale_table, step_index)
        _refill(self.quant_bias, self.quant_bias_table, step_index)

    def step_buffers(self) -> tuple[Tensor, ...]:
        """Return the buffers that `set_step` writes to; a structural twin needs its own."""
        own = _written(self.deq_scale, self.deq_scale_table) + _written(self.quant_bias, self.quant_bias_table)
        return own + self.input.step_buffers()

    def tensors(self) -> dict[str, Tensor]:
        """Return the layer's tensors under their contract names; `quant_linears` rebuilds it from them bit by bit."""
        named = {
            "weight": self.weight,
            "weight_scale": self.weight_scale,
            "weight_offset": None if self.weight_scale is None else torch.zeros_like(self.weight_scale),
            "bias": self.bias,
            "input_scale": self.input.scale if self.input.scale_table is None else self.input.scale_table,
            "input_offset": self.input.offset if self.input.offset_table is None else self.input.offset_table,
            "deq_scale": self.deq_scale if self.deq_scale_table is None else self.deq_scale_table,
            "quant_bias": self.quant_bias if self.quant_bias_table is None else self.quant_bias_table,
            "mul_scale": self.input.mul_scale,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme}, kernel={self.kernel.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        super()._apply(_moves_only(fn), recurse)  # type: ignore[no-untyped-call]
        self.kernel = kernel_for(self.weight.device)
        self.operand = self.kernel.prepare(self.weight)
        return self


def quant_linears(members: Sequence[LayerTensors], *, scheme: str, timestep_sep: int = 0) -> tuple[QuantLinear, ...]:
    """Build the QuantLinears of one layer group, sharing what describes their input.

    Args:
        members: Contract tensors of each member, in row order; their input tensors must be equal.
        scheme: Key of `SCHEMES`.
        timestep_sep: First static step; only for `w8a8_timestep`.

    Raises:
        ConfigError: If the scheme is unknown or members disagree about their input.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme must be one of {sorted(SCHEMES)}, but got '{scheme}'.")
    _require_one_input(members)
    params = InputParams(members[0], is_per_step=SCHEMES[scheme].is_per_step)
    return tuple(QuantLinear(tensors, params, scheme=scheme, timestep_sep=timestep_sep) for tensors in members)


def _require_one_input(members: Sequence[LayerTensors]) -> None:
    for name in ("input_scale", "input_offset", "mul_scale"):
        first = members[0].get(name)
        for other in (member.get(name) for member in members[1:]):
            same = first is other or (first is not None and other is not None and torch.equal(first, other))
            if not same:
                raise ConfigError(f"members of a group must share one {name}, but they differ; quantize them together.")


def _refill(buffer: Tensor | None, table: Tensor | None, row: int) -> None:
    if buffer is not None and table is not None:
        buffer.copy_(table[row])


def _written(buffer: Tensor | None, table: Tensor | None) -> tuple[Tensor, ...]:
    return () if buffer is None or table is None else (buffer,)


def _moves_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Keep what a `Module._apply` function does to the device and drop what it does to the dtype."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move
