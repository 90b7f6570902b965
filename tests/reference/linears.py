"""The modules that the engine puts in the place of nn.Linear: torch in, numpy inside, torch out.

m tokens   k input channels   n output channels   T rows of the step tables
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference.files import ParametersInvalid
from tests.reference.operators import (
    npu_convert_weight_to_int4pack,
    npu_dynamic_quant,
    npu_quant_matmul,
    npu_quantize,
    npu_weight_quant_batchmatmul,
)
from tests.reference.steps import Steps
from tests.reference.typed import Typed, cast


class Stored:
    """The tensors of one layer: below `N.linear.` where the file has `N.div.mul_scale`, below `N.` otherwise."""

    def __init__(self, tensors: Mapping[str, Typed], name: str) -> None:
        self.tensors, self.multiplier = tensors, tensors.get(f"{name}.div.mul_scale")
        self.prefix = name if self.multiplier is None else f"{name}.linear"

    def __getitem__(self, kind: str) -> Typed:
        key = f"{self.prefix}.{kind}"
        if key not in self.tensors:
            raise ParametersInvalid(f"Critical parameter missing: {key}.")
        return self.tensors[key]


class QuantizedLinear(nn.Module):
    """What all three have in common: a transposed weight, a bias if the float Linear has one, a multiplier."""

    def __init__(self, stored: Stored, *, has_bias: bool, dtype: str) -> None:
        super().__init__()
        weight = stored["weight"]
        self.weight_kn, self.dtype = Typed(weight.values.T, weight.dtype), dtype
        self.bias = cast(stored["bias"], dtype) if has_bias else None
        self.multiplier = None if stored.multiplier is None else cast(stored.multiplier, dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = cast(x.detach().float().reshape(-1, x.shape[-1]).numpy(), self.dtype)
        if self.multiplier is not None:
            rows = cast(rows.values * self.multiplier.values, self.dtype)
        y = self.product(rows)
        return torch.from_numpy(y.values).reshape(*x.shape[:-1], -1).to(x.dtype)

    def product(self, x: Typed) -> Typed:
        """Return [m, n] for x [m, k]."""
        raise NotImplementedError


class DynamicLinear(QuantizedLinear):
    """W8A8_DYNAMIC."""

    def __init__(self, stored: Stored, *, has_bias: bool, dtype: str) -> None:
        super().__init__(stored, has_bias=has_bias, dtype=dtype)
        self.weight_scale = cast(Typed(stored["weight_scale"].values.squeeze(), "float32"), dtype)
        if dtype == "float16":
            self.weight_scale = cast(self.weight_scale, "float32")

    def product(self, x: Typed) -> Typed:
        codes, scale = npu_dynamic_quant(x)
        return npu_quant_matmul(
            codes, self.weight_kn, self.weight_scale, pertoken_scale=scale, bias=self.bias, output=self.dtype
        )


def activation_qparams(stored: Stored, k: int, dtype: str) -> tuple[Typed, Typed]:
    """Return scale and offset [..., k], the last dimension repeated; a 0-d one has none and stays as it is."""
    kinds = ("bfloat16", "bfloat16") if dtype == "bfloat16" else ("float32", "int8")
    found = (cast(stored[kind], target) for kind, target in zip(("input_scale", "input_offset"), kinds, strict=True))
    scale, offset = (Typed(t.values.repeat(k, axis=-1), t.dtype) if t.values.ndim else t for t in found)
    return scale, offset


class StaticLinear(QuantizedLinear):
    """W8A8: one range for all inputs; the float bias is read, but `quant_bias` is added."""

    def __init__(self, stored: Stored, *, has_bias: bool, dtype: str) -> None:
        super().__init__(stored, has_bias=has_bias, dtype=dtype)
        self.scale, self.offset = activation_qparams(stored, self.weight_kn.shape[0], dtype)
        self.deq_scale, self.quant_bias = stored["deq_scale"], stored["quant_bias"]

    def product(self, x: Typed) -> Typed:
        codes = npu_quantize(x, self.scale, self.offset)
        return npu_quant_matmul(codes, self.weight_kn, self.deq_scale, bias=self.quant_bias, output=self.dtype)


class WeightOnlyLinear(QuantizedLinear):
    """W8A16, and W4A16 packed; a multiplier moves the other tensors below `N.linear.`, but multiplies no input."""

    def __init__(self, stored: Stored, *, is_int4: bool, has_bias: bool, dtype: str) -> None:
        super().__init__(stored, has_bias=has_bias, dtype=dtype)
        if is_int4:
            self.weight_kn = npu_convert_weight_to_int4pack(self.weight_kn)
        self.scale_1n = cast(Typed(stored["weight_scale"].values.T, "float32"), dtype)
        self.multiplier = None
        if has_bias:
            self.bias = cast(stored["bias"], "float32" if dtype == "bfloat16" else dtype)

    def product(self, x: Typed) -> Typed:
        return npu_weight_quant_batchmatmul(x, self.weight_kn, self.scale_1n, bias=self.bias)


class Int4DynamicLinear(DynamicLinear):
    """W4A4_DYNAMIC; the bias must be there, but is not added, and no input is multiplied."""

    def __init__(self, stored: Stored, *, has_bias: bool, dtype: str) -> None:
        super().__init__(stored, has_bias=has_bias, dtype=dtype)
        self.weight_kn = npu_convert_weight_to_int4pack(self.weight_kn)
        self.multiplier = None

    def product(self, x: Typed) -> Typed:
        codes, scale = npu_dynamic_quant(x, dst="int4")
        return npu_quant_matmul(codes, self.weight_kn, self.weight_scale, pertoken_scale=scale, output=self.dtype)


class TimestepLinear(DynamicLinear):
    """W8A8_TIMESTEP: dynamic but for the steps of the policy, which take their row of the tables."""

    def __init__(self, stored: Stored, steps: Steps, *, has_bias: bool, dtype: str) -> None:
        super().__init__(stored, has_bias=has_bias, dtype=dtype)
        self.steps = steps
        self.scale, self.offset = activation_qparams(stored, self.weight_kn.shape[0], dtype)
        self.deq_scale, self.quant_bias = stored["deq_scale"], stored["quant_bias"]
        steps.largest = self.scale.shape[0]

    def product(self, x: Typed) -> Typed:
        if not self.steps.is_static:
            return super().product(x)
        scale, offset, deq_scale, quant_bias = (
            Typed(np.ascontiguousarray(table.values[self.steps.index]), table.dtype)
            for table in (self.scale, self.offset, self.deq_scale, self.quant_bias)
        )
        codes = npu_quantize(x, scale, offset)
        return npu_quant_matmul(codes, self.weight_kn, deq_scale, bias=quant_bias, output=self.dtype)
