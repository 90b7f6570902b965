"""What an engine does with a description, worked out from names alone: which modules it replaces and what it ignores.

MindIE-SD walks over the modules of the float model. For a module N it looks for the entries `N.linear.weight`,
`N.weight`, `N`, `N.fa_q.scale` and `N.quant_type`: if any says FLOAT the module stays, else the first that names an
algorithm counts. Only Linears are replaced. Entries for other names, algorithms it does not know and algorithms without
effect are passed over without a message, so an export may load "successfully" and run in float.
Sources: mindiesd 3.1.0 (`quantize`, `QuantAlgorithm`); for int8 attention its 2.3 line.
"""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from hyquant.config import FrozenModel, Target
from hyquant.export.layout import ATTENTION_TYPE_KEY, FLOAT, TYPE_KEY, has_diffusers_names
from hyquant.export.manifest import Layout
from hyquant.models.names import layer_groups, to_original
from hyquant.plan import QuantPlan

KEYS = (".linear.weight", ".weight", "", ".fa_q.scale", ".quant_type")
"""What may follow a module's name in the description, in the order in which the engine looks."""

_ENGINES_LINEARS = frozenset({"W8A8", "W8A8_DYNAMIC", "W8A8_TIMESTEP", "W8A16", "W4A16"})
OUR_LINEARS = _ENGINES_LINEARS | {"W4A8", "W4A4_DYNAMIC"}
"""What exports of ours may say of a Linear; engines know the name W4A8, but it has no effect."""

_PER_CHANNEL = frozenset(
    {
        "W8A8_PER_CHANNEL",
        "W8A8_PER_TENSOR",
        "W8A8_PER_CHANNEL_PER_TOKEN",
        "W8A8_PER_CHANNEL_PER_TENSOR",
        "W8A8_PER_TENSOR_PER_TOKEN",
    }
)
_INT8_LINEARS = _ENGINES_LINEARS | _PER_CHANNEL | {"W4A4_DYNAMIC"}
_MX_LINEARS = frozenset({"W8A8_MXFP8", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE"})

LINEARS: Mapping[Target, Collection[str]] = {
    "hyquant": OUR_LINEARS,
    "mindie-sd-2.3/910b": _ENGINES_LINEARS,
    "mindie-sd-3.1/910b": _INT8_LINEARS,
    "mindie-sd-3.1/950": _INT8_LINEARS | _MX_LINEARS,
}
"""Algorithms that make a target replace a Linear."""

ATTENTIONS: Mapping[Target, Collection[str]] = {
    "hyquant": ("FAQUANT", "FP8_DYNAMIC"),
    "mindie-sd-2.3/910b": ("FAQUANT",),
    "mindie-sd-3.1/910b": (),
    "mindie-sd-3.1/950": ("FP8_DYNAMIC", "MXFP8_DYNAMIC", "MXFP4_DYNAMIC"),
}
"""Algorithms that make a target quantize the attention of a module, in capitals."""

QUANT_ALGORITHMS = frozenset(
    _INT8_LINEARS
    | _MX_LINEARS
    | {"FP8_DYNAMIC", "MXFP8_DYNAMIC", "MXFP4_DYNAMIC", "W4A4_MXFP4_SVD", "W4A16_AWQ", "W4A8_AWQ", "W8A16_GPTQ"}
    | {"W4A16_GPTQ", "W4A8", "INT8", "NO_QUANT", "W16A16", "MIXED_PERCISION"}
)
"""All names of mindiesd 3.1; `model_quant_type` must be one of them. The last spelling is the engine's."""

TOP_LEVEL = (TYPE_KEY, ATTENTION_TYPE_KEY, "version", "optional", "metadata")
"""Entries of a description that are no tensor's."""


class Ignored(FrozenModel):
    """A quantized layer or attention that a target leaves in float without a message, and why."""

    name: str
    algorithm: str
    reason: str


class EngineView(FrozenModel):
    """What a target does with an export.

    Attributes:
        replaced: Algorithm by Linear that is replaced.
        attentions: Algorithm by module whose attention is quantized.
        ignored: What stays in float although the description says otherwise.
    """

    replaced: dict[str, str]
    attentions: dict[str, str]
    ignored: tuple[Ignored, ...]


def engine_view(description: Mapping[str, object], modules: Mapping[str, bool], target: Target) -> EngineView:
    """Work out what a target does with a description.

    Args:
        description: The flat table of the export.
        modules: Names of all modules of the float model as the target builds it, each with whether it is a Linear.
        target: What is meant to execute the export.
    """
    entries = {key: value for key, value in description.items() if isinstance(value, str) and key not in TOP_LEVEL}
    replaced: dict[str, str] = {}
    attentions: dict[str, str] = {}
    for name, is_linear in modules.items():
        algorithm = _algorithm(name, entries, target)
        if algorithm is None:
            continue
        if algorithm in LINEARS[target] and is_linear:
            replaced[name] = algorithm
        elif algorithm in ATTENTIONS[target]:
            attentions[name] = algorithm
    done = replaced.keys() | attentions.keys()
    ignored: dict[str, Ignored] = {}
    for key, value in entries.items():
        owners = [key.removesuffix(suffix) for suffix in KEYS if key.endswith(suffix)]
        if value == FLOAT or len(owners) < 2 or done & set(owners):
            continue  # says nothing, decides nothing (a key that is its own only owner), or was heeded
        name = next((owner for owner in owners if owner in modules), _layer_of(key, entries))
        reason = _objection(name, value, entries, modules, target)
        ignored.setdefault(name, Ignored(name=name, algorithm=value, reason=reason))
    return EngineView(replaced=replaced, attentions=attentions, ignored=tuple(ignored.values()))


def engine_modules(denoiser: nn.Module, layout: Layout) -> dict[str, bool]:
    """Return the modules of a denoiser by name, in a layout's names, each with whether it is a Linear.

    Args:
        denoiser: The float denoiser, in diffusers' or its own layout.
        layout: "original" gives a diffusers HunyuanVideo the names that an engine's own model has.
    """
    groups = layer_groups(denoiser)
    if layout == "diffusers" or not has_diffusers_names(groups):
        return {name: isinstance(module, nn.Linear) for name, module in denoiser.named_modules() if name}
    shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in denoiser.state_dict().items()}
    others = dict.fromkeys(parents_of(to_original(shapes)), False)
    return others | dict.fromkeys((group.name for group in groups), True)


def planned_modules(plan: QuantPlan, keys: Collection[str], *, layout: Layout, target: Target) -> dict[str, bool]:
    """Return what `engine_modules` would, as far as plan and tensor names tell, for when there is no denoiser."""
    is_original = target.startswith("mindie-sd") or layout == "original" or not has_diffusers_names(plan.layers)
    linears = {name: True for layer in plan.layers for name in ((layer.name,) if is_original else layer.modules)}
    blocks = {block.name if is_original else block.module: False for block in plan.attentions}
    others = dict.fromkeys(parents_of(keys), False) if is_original == (layout == "original") else {}
    return others | blocks | linears


def _algorithm(name: str, entries: Mapping[str, str], target: Target) -> str | None:
    """Return the algorithm that counts for a module, in capitals; None if it stays in float."""
    values = [entries[name + suffix] for suffix in KEYS if name + suffix in entries]
    known = QUANT_ALGORITHMS | set(ATTENTIONS[target])
    return None if FLOAT in values else next((value.upper() for value in values if value.upper() in known), None)


def _layer_of(key: str, entries: Mapping[str, str]) -> str:
    """Return the layer that a key which names no module was meant for."""
    layer = key.removesuffix(".linear.weight")
    if f"{layer}.div.mul_scale" in entries:
        return layer
    return next((key.removesuffix(suffix) for suffix in KEYS[1:] if suffix and key.endswith(suffix)), key)


def _objection(
    name: str, algorithm: str, entries: Mapping[str, str], modules: Mapping[str, bool], target: Target
) -> str:
    """Return why a target leaves a module in float although an entry says otherwise."""
    known = algorithm.upper()
    if known not in LINEARS[target] and known not in ATTENTIONS[target]:
        return f"{target} does not execute {algorithm}"
    if name not in modules:
        return "the model has no module of that name"
    if FLOAT in (entries.get(name + suffix) for suffix in KEYS):
        return "another entry of the same module says FLOAT, and FLOAT wins"
    return "the module of that name is no Linear"


def parents_of(keys: Collection[str]) -> Iterator[str]:
    """Return every module that the names of tensors lie in, from the outermost on."""
    for key in keys:
        parts = key.split(".")[:-1]
        yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))
