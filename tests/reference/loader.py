"""A loader that does with an export what MindIE-SD 3.1 does, written from its observed behaviour alone.

It stands for the engine in tests: it knows nothing of hyquant's modules, and shares no code with them. Like the
engine, it looks at every module of the float model under a fixed list of keys, replaces Linears that the description
names, and says nothing about names that match no module; so callers count what it replaced.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tests.reference.attentions import Float8Attention, Int8Attention, quantized_attention, rerouted
from tests.reference.files import ALGORITHMS, read_export
from tests.reference.linears import (
    DynamicLinear,
    Int4DynamicLinear,
    StaticLinear,
    Stored,
    TimestepLinear,
    WeightOnlyLinear,
)
from tests.reference.steps import Steps
from tests.reference.typed import Typed, cast

KEYS = ("{}.linear.weight", "{}.weight", "{}", "{}.fa_q.scale", "{}.quant_type")
WITHOUT_EFFECT = frozenset(
    {"W4A16_AWQ", "W4A8_AWQ", "W8A16_GPTQ", "W4A16_GPTQ", "W4A8", "INT8", "NO_QUANT", "W16A16", "MIXED_PERCISION"}
)


@dataclass(frozen=True)
class Loaded:
    """What was replaced: algorithm by module name, and the steps that time-step layers follow.

    `changed_by_casts` names the stored scales that the engine's dtype cannot represent. The engine says nothing of
    them, but weights and `deq_scale` were then made with another value than it computes with.
    """

    model: nn.Module
    dtype: str
    linears: dict[str, str]
    attentions: dict[str, Any]
    steps: Steps
    changed_by_casts: tuple[str, ...]

    def running(self) -> AbstractContextManager[None]:
        """Let the blocks' attention calls reach `fa_quant` within the context."""
        return rerouted(self.model, self.attentions, quantized_attention(self.attentions, self.dtype))


def load(
    model: nn.Module,
    description_path: Path,
    *,
    dtype: str = "bfloat16",
    static_steps: Collection[int] = (),
    line: str = "3.1",
    rank: int | None = None,
) -> Loaded:
    """Replace in place the Linears of a float model that an export describes.

    Args:
        model: With the original float weights.
        description_path: The JSON file.
        dtype: "bfloat16" or "float16", of the engine's activations.
        static_steps: Steps at which time-step layers use their tables; none unless told.
        line: "2.3" knows FAQuant, "3.1" ignores it.
        rank: Of this process, for files with a rank in their names.
    """
    description, tensors = read_export(description_path, rank=rank)
    steps, linears, attentions = Steps(static_steps), {}, {}
    for name, module in list(model.named_modules()):
        algorithm = algorithm_of(name, description)
        if algorithm == "FAQUANT" and line == "2.3":
            attentions[name] = Int8Attention(tensors, name, dtype)
        elif algorithm == "FP8_DYNAMIC" and f"{name}.quant_type" in description:
            attentions[name] = Float8Attention(tensors, name, dtype)
        elif algorithm in ALGORITHMS - WITHOUT_EFFECT and isinstance(module, nn.Linear):
            replace(model, name, quantized_linear(algorithm, tensors, name, module, steps, dtype))
            linears[name] = algorithm
    return Loaded(model, dtype, linears, attentions, steps, changed_by_casts(tensors, dtype))


def algorithm_of(name: str, description: dict[str, str]) -> str | None:
    """Return the upper-case algorithm of a module: that of the first of its keys, but FLOAT wins wherever it stands."""
    found = [description[key.format(name)].upper() for key in KEYS if key.format(name) in description]
    if not found or "FLOAT" in found:
        return None
    return found[0]


def quantized_linear(
    algorithm: str, tensors: dict[str, Typed], name: str, linear: nn.Linear, steps: Steps, dtype: str
) -> nn.Module:
    """Build the module that replaces a Linear."""
    stored, has_bias = Stored(tensors, name), linear.bias is not None
    if algorithm == "W8A8":
        return StaticLinear(stored, has_bias=has_bias, dtype=dtype)
    if algorithm == "W8A8_DYNAMIC":
        return DynamicLinear(stored, has_bias=has_bias, dtype=dtype)
    if algorithm == "W8A8_TIMESTEP":
        return TimestepLinear(stored, steps, has_bias=has_bias, dtype=dtype)
    if algorithm == "W4A4_DYNAMIC":
        return Int4DynamicLinear(stored, has_bias=has_bias, dtype=dtype)
    if algorithm in ("W8A16", "W4A16"):
        return WeightOnlyLinear(stored, is_int4=algorithm == "W4A16", has_bias=has_bias, dtype=dtype)
    raise NotImplementedError(f"the reference has no {algorithm} for {name}")


def changed_by_casts(tensors: dict[str, Typed], dtype: str) -> tuple[str, ...]:
    """Return the names of the scales that change in the engine: all but `deq_scale`, and of float16 `input_scale`."""
    kinds = ("weight_scale", "mul_scale", "fa_q.scale", "fa_k.scale", "fa_v.scale")
    kinds += ("input_scale",) if dtype == "bfloat16" else ()
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(kinds)}
    return tuple(name for name, found in scales.items() if (cast(found, dtype).values != found.values).any())


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with a dotted name."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module
