"""What can be wrong with the files, the description and the tensors of an export of msModelSlim's.

    N output channels   K input channels   T table rows   A heads

Sources: msmodelslim 26.1.0 (its savers), mindiesd 3.1.0.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hyquant.config import Target
from hyquant.export.checks import value_problems
from hyquant.export.engine import ATTENTIONS, QUANT_ALGORITHMS, TOP_LEVEL
from hyquant.export.files import kind_problem, mode_problem
from hyquant.export.layout import FLOAT, TYPE_KEY
from hyquant.export.names import FileNames

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "W8A8_DYNAMIC": ("weight", "weight_scale"),
    "W8A8": ("weight", "input_scale", "input_offset", "deq_scale", "quant_bias"),
    "W8A8_TIMESTEP": ("weight", "weight_scale", "input_scale", "input_offset", "deq_scale", "quant_bias"),
    "W8A16": ("weight", "weight_scale"),
    "W4A16": ("weight", "weight_scale"),
    "W4A8": ("weight", "weight_scale"),
    "W4A4_DYNAMIC": ("weight", "weight_scale"),
}
_ROTATED = ("FP8_DYNAMIC", "MXFP8_DYNAMIC")
MAX_SCALE_ERROR = 0.02
"""Between deq_scale and the product it stands for: two roundings to bfloat16 are below 1 %."""


def file_problems(folder: Path, names: FileNames) -> Iterator[str]:
    """Check kinds and modes of one pair of files."""
    for name in (names.description, names.weights):
        path = folder / name
        if not path.is_symlink() and not path.exists():
            continue  # in parts, or missing, as the reader says
        problem = kind_problem(path) or mode_problem(path)
        if problem is not None:
            yield problem


def description_problems(
    names: FileNames, description: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    """Check that the description names every tensor with an algorithm that there is."""
    quant_type = description.get(TYPE_KEY)
    if not isinstance(quant_type, str) or quant_type not in QUANT_ALGORITHMS:
        yield f"{names.description} must have {TYPE_KEY} of the engine's algorithms, but says {quant_type!r}"
    described = {key for key in description if key not in TOP_LEVEL and not key.endswith(".quant_type")}
    for key in sorted(tensors.keys() - described):
        yield f"{names.description} must describe {key}, but does not"
    for key in sorted(described - tensors.keys()):
        yield f"{names.description} describes {key}, but there is no such tensor"
    known = QUANT_ALGORITHMS | {FLOAT, "FAQUANT"}
    for key in sorted(described & tensors.keys()):
        value = description[key]
        if not isinstance(value, str) or value.upper() not in known:
            yield f"{names.description} must name an algorithm for {key}, but says {value!r}; the engine ignores it"


def algorithms_of(description: Mapping[str, object]) -> dict[str, str]:
    """Return the algorithm of every quantized layer, by its name without `.linear`."""
    found: dict[str, str] = {}
    for key, value in description.items():
        if key.endswith(".weight") and isinstance(value, str) and value.upper() in QUANT_ALGORITHMS:
            layer = key.removesuffix(".weight")
            found[layer.removesuffix(".linear") if _is_smoothed(key, description) else layer] = value.upper()
    return found


def _is_smoothed(weight_key: str, keys: Mapping[str, object]) -> bool:
    layer = weight_key.removesuffix(".weight").removesuffix(".linear")
    return weight_key == f"{layer}.linear.weight" and f"{layer}.div.mul_scale" in keys


def tensors_of(layer: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Return the prefix of a layer's tensors, and the tensors by kind."""
    prefix = f"{layer}.linear" if f"{layer}.div.mul_scale" in tensors else layer
    kinds = {
        key.removeprefix(f"{prefix}."): tensor
        for key, tensor in tensors.items()
        if key.startswith(f"{prefix}.") and "." not in key.removeprefix(f"{prefix}.")
    }
    if prefix != layer:
        kinds["mul_scale"] = tensors[f"{layer}.div.mul_scale"]
    return prefix, kinds


def layer_problems(layer: str, algorithm: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Check one layer's tensors: which are there, dtypes, shapes, values, and that they agree with each other."""
    if algorithm not in _NEEDED:
        return
    prefix, kinds = tensors_of(layer, tensors)
    missing = [kind for kind in _NEEDED[algorithm] if kind not in kinds]
    for kind in missing:
        yield f"{prefix}.{kind} of a {algorithm} layer must be there, but is missing"
    weight = kinds.get("weight")
    if weight is None or weight.ndim != 2:
        if weight is not None:
            yield f"{prefix}.weight must have two dimensions, but has shape {tuple(weight.shape)}"
        return
    rows, channels = weight.shape
    table = kinds["input_scale"].shape[:-1] if "input_scale" in kinds and algorithm == "W8A8_TIMESTEP" else ()
    allowed: dict[str, tuple[tuple[torch.dtype, ...], tuple[tuple[int, ...], ...]]] = {
        "weight": ((torch.int8,), ((rows, channels),)),
        "weight_scale": (_FLOATS, ((rows, 1), (rows,))),
        "weight_offset": (_FLOATS, ((rows, 1), (rows,))),
        "bias": (_FLOATS, ((rows,),)),
        "input_scale": (_FLOATS, ((*table, 1),)),
        "input_offset": (_FLOATS, ((*table, 1),)),
        "deq_scale": ((torch.float32, torch.int64), ((*table, rows),)),
        "quant_bias": ((torch.int32,), ((*table, rows),)),
        "mul_scale": (_FLOATS, ((channels,),)),
    }
    fits = not missing
    for kind, tensor in kinds.items():
        if kind not in allowed:
            continue
        dtypes, shapes = allowed[kind]
        shape = next((shape for shape in shapes if tuple(tensor.shape) == shape), shapes[0])
        found = list(value_problems(f"{prefix}.{kind}", tensor, dtypes, shape))
        fits = fits and not found
        yield from found
    if fits and {"input_scale", "deq_scale", "weight_scale"} <= kinds.keys():
        product = kinds["input_scale"].float() * kinds["weight_scale"].float().flatten()
        error = (_deq(kinds) / product - 1.0).abs().max().item()
        if not error <= MAX_SCALE_ERROR:
            yield (
                f"{prefix}.deq_scale must be input_scale times weight_scale, but is off by {error:.1%}; its static "
                "steps would have another gain"
            )


def _deq(kinds: Mapping[str, Tensor]) -> Tensor:
    scale = kinds["deq_scale"]
    return scale.to(torch.int32).view(torch.float32) if scale.dtype == torch.int64 else scale


def attention_problems(
    description: Mapping[str, object], tensors: Mapping[str, Tensor], target: Target
) -> Iterator[str]:
    """Check what the target reads of quantized attentions: rotations, and scales of q, k and v.

    The engine stops without both rotations. msModelSlim writes one scale per token, not per head.
    """
    for key, value in description.items():
        block = key.removesuffix(".quant_type")
        if block == key or str(value).upper() not in _ROTATED or str(value).upper() not in ATTENTIONS[target]:
            continue
        for kind in ("q_rot", "k_rot"):
            if f"{block}.{kind}" not in tensors:
                yield f"{block}.{kind} of a {value} attention must be there, but is missing"
    if "FAQUANT" not in ATTENTIONS[target]:
        return
    blocks = sorted(
        {key.rpartition(".fa_")[0] for key, value in description.items() if ".fa_" in key and value == "FAQuant"}
    )
    for block in blocks:
        scales = [tensors.get(f"{block}.fa_{part}.scale") for part in "qkv"]
        shapes = {tuple(scale.shape) for scale in scales if scale is not None}
        norm = tensors.get(f"{block}.img_attn_q_norm.weight", tensors.get(f"{block}.q_norm.weight"))
        proj = tensors.get(f"{block}.img_attn_proj.weight", tensors.get(f"{block}.linear2.weight"))
        heads = None if norm is None or proj is None else proj.shape[0] // norm.shape[0]
        if any(scale is None for scale in scales) or len(shapes) != 1:
            yield f"{block}.fa_q, fa_k and fa_v must each have a scale of one shape, but have {sorted(shapes)}"
        elif heads is not None and shapes != {(heads, 1)}:
            yield (
                f"{block}.fa_q.scale must have one row for each of {heads} heads, but has shape {next(iter(shapes))}; "
                "one per token, as msModelSlim writes them, fits no other clip size"
            )


def float_problems(description: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Check that what stays in float is finite."""
    for key, tensor in tensors.items():
        if description.get(key) == FLOAT and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            yield f"{key} must be finite, but is not"
