"""QuantLinear: a Linear that holds integer weights, as int8, and runs an int8 kernel, or a float one on float inputs.

The members of a fused group read the same input, so one `FusedLinear` holds their weights, one below the other, and
what describes their input: the first member that is called quantizes the input once and multiplies by all weights in
one product, the others take their columns of it. What depends on the denoising step lives in fixed buffers that
`set_step` refills, and whether the step is static is a Python bool: under `torch.compile` that makes two variants of a
block, and no step index ever enters a graph.

N output channels   K input channels   T table rows
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hyquant.errors import CalibrationError, ConfigError
from hyquant.kernels import Int8Linear, weight_only
from hyquant.kernels.selection import LinearShape, kernel_for, kind_on
from hyquant.latency_report import KernelKind
from hyquant.schemes import SCHEMES
from hyquant.schemes.contract import INPUT_TENSORS, ROW_DIMS, LayerTensors

_PER_STEP = ("input_scale", "input_offset", "deq_scale", "quant_bias")
_HELD = ("weight", "weight_scale", "bias", "deq_scale", "quant_bias", *INPUT_TENSORS)


class FusedLinear(nn.Module):
    """The quantized Linears of one layer group as one, N output channels in all; built by `quant_linears`.

    Moving it moves its tensors; casting it (`.to(dtype)`, `.half()`) leaves them as they are, because int8 codes and
    scales belong together.

    Attributes:
        scheme: The scheme's name.
        timestep_sep: First static step of `w8a8_timestep`; 0 otherwise.
        is_weight_only: Whether inputs stay in float.
        largest_code: What the largest value of a token becomes where each has its own range.
        is_static_step: Whether the stored range is used; None before the clock of a `w8a8_timestep` group is set.
        sizes: Output channels of each member; they add up to N.
        weight: [N, K] int8.
        input_scale, input_offset: [1] float32, of the current step; None without a stored range.
        mul_scale: [K] float32 or None, what the input is multiplied by first.
        weight_scale, bias, deq_scale, quant_bias: As in `hyquant.schemes.contract`, of the current step.
        input_scale_table, input_offset_table, deq_scale_table, quant_bias_table: Rows of all steps; None unless there
            is one range per step.
    """

    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_offset: Tensor | None
    mul_scale: Tensor | None
    deq_scale: Tensor | None
    quant_bias: Tensor | None
    input_scale_table: Tensor | None
    input_offset_table: Tensor | None
    deq_scale_table: Tensor | None
    quant_bias_table: Tensor | None
    operand: Tensor | None

    def __init__(self, members: Sequence[LayerTensors], *, scheme: str, timestep_sep: int) -> None:
        super().__init__()
        self.scheme = scheme
        self.timestep_sep = timestep_sep
        is_per_step = SCHEMES[scheme].is_per_step
        self.is_weight_only = SCHEMES[scheme].is_weight_only
        self.largest_code = 2 ** ((SCHEMES[scheme].input_bits or 8) - 1) - 1
        self.is_static_step: bool | None = None if is_per_step else SCHEMES[scheme].needs_range
        self.sizes = tuple(member["weight"].shape[0] for member in members)
        for name in _HELD:
            tensor = _joined(name, members)
            if name in _PER_STEP:
                self.register_buffer(f"{name}_table", tensor if is_per_step else None)
                tensor = tensor[0].clone() if is_per_step and tensor is not None else tensor
            self.register_buffer(name, tensor)
        self._kernel: Int8Linear | None = None
        self.register_buffer("operand", None, persistent=False)
        self._pending: tuple[Tensor, int, list[Tensor | None]] | None = None

    @property
    def kernel(self) -> Int8Linear:
        """Return the int8 kernel that runs it, chosen when it is first asked for; not where it is weight-only."""
        assert not self.is_weight_only
        if self._kernel is None:
            self._kernel = kernel_for(self.weight.device, LinearShape(*self.weight.shape))
        return self._kernel

    @property
    def kernel_name(self) -> str:
        """Return the name of what runs it: a key of `KERNELS`, or that of the weight-only product."""
        return weight_only.NAME if self.is_weight_only else self.kernel.name

    @property
    def kernel_kind(self) -> KernelKind:
        """Return how the matrix product runs here: "native" or "simulated"."""
        if self.is_weight_only:
            return "simulated"
        return kind_on(self.weight.device) if self._kernel is None else self._kernel.kind

    def use_kernel(self, kernel: Int8Linear) -> None:
        """Run on another int8 kernel from now on; a weight-only group is not changed by it."""
        self._kernel, self.operand = kernel, None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def prepare(self) -> None:
        """Choose the int8 kernel and lay the weight out for it; the first forward does it if nobody did."""
        if self.operand is None and not self.is_weight_only:
            with torch.inference_mode(False):
                self.operand = self.kernel.prepare(self.weight)

    def member(self, x: Tensor, index: int) -> Tensor:
        """Return what one member makes of x, [..., its sizes], and keep what the others make of it until they ask.

        A member that asks twice, or another input, makes a new product.
        """
        if len(self.sizes) == 1:
            output: Tensor = self(x)
            return output
        # Inference tensors count no versions; nor does a traced graph, where all members read one value.
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        pending = self._pending
        if pending is None or pending[0] is not x or pending[1] != version or pending[2][index] is None:
            self._pending = pending = (x, version, list(torch.split(self(x), list(self.sizes), dim=-1)))
        outputs = pending[2]
        mine = outputs[index]
        assert mine is not None
        outputs[index] = None
        if all(other is None for other in outputs):
            self._pending = None
        return mine

    def forward(self, x: Tensor) -> Tensor:
        """Apply all members: x [..., K] in any float dtype -> [..., N] in the same, or in that of autocast.

        As a Linear's, the output has autocast's dtype where autocast is enabled and x is not float64.

        Raises:
            CalibrationError: If a `w8a8_timestep` group does not know the denoising step.
        """
        if self.is_static_step is None:
            raise CalibrationError(
                "a w8a8_timestep layer must know the denoising step, but its clock was never set; "
                "call clock.set(step_index) before the forward."
            )
        if self.is_weight_only:
            assert self.weight_scale is not None
            return weight_only.weight_only_linear(
                x, self.weight, weight_scale=self.weight_scale, bias=self.bias, mul_scale=self.mul_scale
            )
        if self.operand is None:
            self.prepare()
        device = x.device.type
        is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if not is_cast or x.dtype == torch.float64:
            return self._integer_product(x)
        with torch.autocast(device, enabled=False):  # it would round the sums of a product that is exact in float32
            y = self._integer_product(x)
        return y.to(torch.get_autocast_dtype(device))

    def _integer_product(self, x: Tensor) -> Tensor:
        """Return what the kernel makes of x, in the dtype of x."""
        assert self.operand is not None
        if self.is_static_step:
            assert self.input_scale is not None
            assert self.input_offset is not None
            assert self.deq_scale is not None
            assert self.quant_bias is not None
            return self.kernel.static(
                x,
                self.operand,
                input_scale=self.input_scale,
                input_offset=self.input_offset,
                deq_scale=self.deq_scale,
                quant_bias=self.quant_bias,
                mul_scale=self.mul_scale,
            )
        assert self.weight_scale is not None
        return self.kernel.dynamic(
            x,
            self.operand,
            weight_scale=self.weight_scale,
            bias=self.bias,
            mul_scale=self.mul_scale,
            largest_code=self.largest_code,
        )

    def set_step(self, step_index: int) -> None:
        """Use the mode and the table row of a denoising step; only `w8a8_timestep` groups depend on it.

        Raises:
            CalibrationError: If a static step has no table row.
        """
        if self.deq_scale_table is None:
            return
        is_static, num_rows = step_index >= self.timestep_sep, self.deq_scale_table.shape[0]
        if is_static and step_index >= num_rows:
            raise CalibrationError(
                f"a static step must have a calibrated range, but step {step_index} is beyond the {num_rows} rows; "
                "quantize with the number of steps that runs."
            )
        self.is_static_step = is_static
        for name in _PER_STEP if is_static else ():
            getattr(self, name).copy_(getattr(self, f"{name}_table")[step_index])

    def step_buffers(self) -> tuple[Tensor, ...]:
        """Return the buffers that `set_step` writes to; a structural twin needs its own."""
        return () if self.deq_scale_table is None else tuple(getattr(self, name) for name in _PER_STEP)

    def stored(self, name: str, index: int) -> Tensor | None:
        """Return a member's part of a contract tensor, contiguous; all table rows where there are any."""
        table = getattr(self, f"{name}_table") if name in _PER_STEP else None
        tensor: Tensor | None = getattr(self, name) if table is None else table
        if tensor is None or name not in ROW_DIMS:
            return tensor
        return torch.split(tensor, list(self.sizes), dim=ROW_DIMS[name])[index].contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedLinear":
        device = self.weight.device
        super()._apply(_moves_only(fn), recurse)  # type: ignore[no-untyped-call]
        if self.weight.device != device:
            self._kernel, self.operand = None, None
        return self


class QuantLinear(nn.Module):
    """A quantized Linear in place of a float one: one member of a `FusedLinear`; built by `quant_linears`.

    Inputs are [..., K] in any float dtype, outputs [..., N] in the same, or in that of autocast; see
    `hyquant.kernels.base` for the arithmetic.

    Attributes:
        fused: The group it belongs to.
        index: Which member it is.
        has_bias: Whether the float Linear had one.
    """

    def __init__(self, fused: FusedLinear, index: int, *, has_bias: bool) -> None:
        super().__init__()
        self.fused = fused
        self.index = index
        self.has_bias = has_bias
        self.out_features, self.in_features = fused.sizes[index], fused.weight.shape[1]

    @property
    def weight(self) -> Tensor:
        """Return the member's rows, [N, K] int8, of however many bits."""
        weight = self.fused.stored("weight", self.index)
        assert weight is not None
        return weight

    @property
    def scheme(self) -> str:
        """Return the scheme's name."""
        return self.fused.scheme

    @property
    def kernel_kind(self) -> KernelKind:
        """Return how the matrix product runs here: "native" or "simulated"."""
        return self.fused.kernel_kind

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., K], any float dtype, any number of rows.

        Returns:
            [..., N] in x's dtype, or in that of autocast; for a member of several, columns of their common product.

        Raises:
            ConfigError: If x is not float: modules that cast their input to the dtype of this weight get int8.
            CalibrationError: If the denoising step matters and is not known.
        """
        if not x.is_floating_point():
            raise ConfigError(
                f"the input of a quantized layer must be float, but is {x.dtype}: what comes before casts to the dtype "
                "of the layer's weight, as timestep embedders do; exclude the layer."
            )
        return self.fused.member(x, self.index)

    def set_step(self, step_index: int) -> None:
        """Use the mode and the table row of a denoising step; see `FusedLinear.set_step`."""
        self.fused.set_step(step_index)

    def tensors(self) -> dict[str, Tensor]:
        """Return the layer's tensors under their contract names; `quant_linears` rebuilds it from them bit by bit."""
        named = {name: self.fused.stored(name, self.index) for name in _HELD}
        if not self.has_bias:
            named["bias"] = None
        if "weight_offset" in SCHEMES[self.scheme].specs(self.out_features, self.in_features, 1):
            named["weight_offset"] = torch.zeros(self.out_features, 1, device=self.fused.weight.device)
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme}"


def quant_linears(members: Sequence[LayerTensors], *, scheme: str, timestep_sep: int = 0) -> tuple[QuantLinear, ...]:
    """Build the QuantLinears of one layer group, which run as one.

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
    fused = FusedLinear(members, scheme=scheme, timestep_sep=timestep_sep)
    return tuple(QuantLinear(fused, index, has_bias="bias" in tensors) for index, tensors in enumerate(members))


def _require_one_input(members: Sequence[LayerTensors]) -> None:
    for name in INPUT_TENSORS:
        first = members[0].get(name)
        for other in (member.get(name) for member in members[1:]):
            same = first is other or (first is not None and other is not None and torch.equal(first, other))
            if not same:
                raise ConfigError(f"members of a group must share one {name}, but they differ; quantize them together.")


def _joined(name: str, members: Sequence[LayerTensors]) -> Tensor | None:
    """Return one tensor of a whole group; a bias of 0 for members without one if another has one."""
    found = [member.get(name) for member in members]
    if name not in ROW_DIMS or len(members) == 1:
        return found[0]
    present = [tensor for tensor in found if tensor is not None]
    if not present:
        return None
    rows = [
        torch.zeros(member["weight"].shape[0], device=present[0].device) if tensor is None else tensor
        for tensor, member in zip(found, members, strict=True)
    ]
    return torch.cat(rows, dim=ROW_DIMS[name])


def _moves_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Keep what a `Module._apply` function does to the device and drop what it does to the dtype."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move
