"""What can be wrong with an export: each check yields problems as sentences, none if all is well.

Sources of the rules: the files MindIE-SD 3.1 accepts and the shapes and dtypes its W8A8 layers read.

    N output channels   K input channels   T steps of the table
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hyquant.attention.int8 import PARTS
from hyquant.errors import ExportError
from hyquant.export.files import file_problems, rank_problems, read_description, read_tensors
from hyquant.export.layout import attention_names, describe, layer_names, stored_dtype
from hyquant.export.manifest import ExportManifest
from hyquant.plan import AttentionPlan, LayerPlan
from hyquant.schemes import scheme_of
from hyquant.schemes.base import WEIGHT_CODES

Shape = tuple[int, ...]

MAX_ROTATION_ERROR = 1e-2
"""What bfloat16 entries of an orthogonal matrix may make of the identity; ours are exact."""


def read_checked(folder: Path, manifest: ExportManifest) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of an export and return them, on the CPU, with everything that is wrong with the folder.

    Of pairs with the same digests, which every rank's are, one is read. What cannot be read is not looked into; then
    the tensors are incomplete or missing, and there are problems.
    """
    problems = [*file_problems(folder, manifest), *rank_problems(manifest)]
    names = manifest.names[0]
    description = folder / names.description
    if not description.is_file():
        return {}, problems
    tensors, unreadable = read_tensors(folder, names)
    if unreadable:
        return {}, [*problems, *(problem for problem in unreadable if problem not in problems)]
    try:
        problems.extend(description_problems(read_description(description), tensors, manifest))
    except ExportError as error:
        problems.append(str(error))
    problems.extend(tensor_problems(tensors, manifest))
    return tensors, problems


def description_problems(found: Mapping[str, object], keys: Iterable[str], manifest: ExportManifest) -> Iterator[str]:
    """Check that the description names exactly the tensors, each with the algorithm of the plan."""
    name = manifest.names[0].description
    plan, layout = manifest.plan, manifest.layout
    schemes, attentions = layer_names(plan, layout), attention_names(plan, layout)
    expected = describe(list(keys), schemes, manifest.model_quant_type, attentions)
    for key in sorted(set(expected) - set(found)):
        yield f"{name} must describe {key}, but does not"
    for key in sorted(set(found) - set(expected)):
        yield f"{name} describes {key}, but there is no such tensor"
    for key in sorted(set(expected) & set(found)):
        if found[key] != expected[key]:
            yield f"{name} must say {expected[key]} for {key}, but says {found[key]}"


def tensor_problems(tensors: Mapping[str, Tensor], manifest: ExportManifest) -> Iterator[str]:
    """Check presence, dtype, shape and values of every layer's tensors, and that all others are finite floats."""
    seen: set[str] = set()
    for layer in manifest.plan.layers:
        for name, rows in _rows_by_name(layer, manifest):
            expected = expected_tensors(layer, name, rows, manifest)
            seen |= set(expected) | {f"{_prefix(layer, name)}.bias"}
            for key, (dtypes, shape) in expected.items():
                if key not in tensors:
                    yield f"{key} of layer {layer.name} must be there, but is missing"
                else:
                    yield from value_problems(key, tensors[key], dtypes, shape)
            yield from _bias_problems(f"{_prefix(layer, name)}.bias", tensors, layer, rows)
            yield from _code_problems(f"{_prefix(layer, name)}.weight", tensors, layer, manifest)
    for name, block in attention_names(manifest.plan, manifest.layout).items():
        expected = expected_attention_tensors(block, name, manifest)
        seen |= set(expected)
        for key, (dtypes, shape) in expected.items():
            if key not in tensors:
                yield f"{key} of the attention of {block.name} must be there, but is missing"
            else:
                yield from value_problems(key, tensors[key], dtypes, shape)
        yield from _rotation_problems(name, tensors)
    for key in sorted(set(tensors) - seen):
        if not tensors[key].is_floating_point():
            yield f"{key} belongs to no quantized layer and must be float, but is {tensors[key].dtype}"
        elif not torch.isfinite(tensors[key]).all():
            yield f"{key} must be finite, but is not"


def expected_tensors(
    layer: LayerPlan, name: str, rows: int, manifest: ExportManifest
) -> dict[str, tuple[tuple[torch.dtype, ...], Shape]]:
    """Return what must be stored of a layer, but its bias: key -> allowed dtypes and shape."""
    prefix = _prefix(layer, name)
    floats = (torch.float32, torch.bfloat16, torch.float16)
    linear = manifest.config.linear
    if layer.scheme is None or linear is None:
        return {f"{prefix}.weight": (floats, (rows, layer.in_features))}
    kinds = scheme_of(linear).specs(rows, layer.in_features, manifest.num_steps)
    expected: dict[str, tuple[tuple[torch.dtype, ...], Shape]] = {
        f"{prefix}.{kind}": ((stored_dtype(kind, dtype, manifest.config.deploy_dtype),), shape)
        for kind, (dtype, shape) in kinds.items()
    }
    if layer.has_multiplier:
        expected[f"{name}.div.mul_scale"] = ((torch.float32,), (layer.in_features,))
    return expected


def expected_attention_tensors(
    block: AttentionPlan, name: str, manifest: ExportManifest
) -> dict[str, tuple[tuple[torch.dtype, ...], Shape]]:
    """Return what must be stored of a quantized attention: key -> allowed dtypes and shape."""
    if block.scheme == "fa3_int8":
        dtypes = {"scale": torch.float32, "offset": torch.int8}
        return {f"{name}.{part}.{kind}": ((dtypes[kind],), (block.heads, 1)) for part in PARTS for kind in dtypes}
    dtype: torch.dtype = getattr(torch, manifest.config.deploy_dtype)
    return {f"{name}.{kind}": ((dtype,), (block.head_dim, block.head_dim)) for kind in ("q_rot", "k_rot")}


def _rotation_problems(name: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Check that rotating q and k leaves their products as they are."""
    if not {f"{name}.q_rot", f"{name}.k_rot"} <= set(tensors):
        return
    q_rot, k_rot = (tensors[f"{name}.{kind}"].double() for kind in ("q_rot", "k_rot"))
    if q_rot.ndim != 2 or q_rot.shape != k_rot.shape:
        return
    error = (q_rot @ k_rot.T - torch.eye(len(q_rot), dtype=torch.double)).abs().max().item()
    if not error <= MAX_ROTATION_ERROR:
        yield f"{name}.q_rot times {name}.k_rot transposed must be the identity, but is off by {error:.3g}"


def value_problems(key: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: Shape) -> Iterator[str]:
    """Check dtype, shape and values of one tensor of a quantized layer or attention."""
    if tensor.dtype not in dtypes:
        yield f"{key} must be {' or '.join(map(str, dtypes))}, but is {tensor.dtype}"
    if tuple(tensor.shape) != shape:
        yield f"{key} must have shape {shape}, but has {tuple(tensor.shape)}"
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        yield f"{key} must be finite, but is not"
        return
    kind = key.rpartition(".")[2]
    if (kind == "scale" or kind.endswith("_scale")) and not bool((tensor > 0).all()):
        yield f"{key} must be positive, but has {int((tensor <= 0).sum())} values that are not"
    if kind == "input_offset" and not bool(((tensor == tensor.round()) & (tensor >= -128) & (tensor <= 127)).all()):
        yield f"{key} must hold integers in [-128, 127], but holds others"
    if kind in ("weight_offset", "offset") and bool(tensor.any()):
        yield f"{key} must be zero, because engines take weights, q, k and v as symmetric, but is not"


def _bias_problems(key: str, tensors: Mapping[str, Tensor], layer: LayerPlan, rows: int) -> Iterator[str]:
    if key not in tensors:
        return
    bias = tensors[key]
    if layer.scheme is not None and bias.dtype != torch.float32:
        yield f"{key} must be torch.float32, but is {bias.dtype}"
    if tuple(bias.shape) != (rows,):
        yield f"{key} must have shape {(rows,)}, but has {tuple(bias.shape)}"
    if not torch.isfinite(bias).all():
        yield f"{key} must be finite, but is not"


def _code_problems(
    key: str, tensors: Mapping[str, Tensor], layer: LayerPlan, manifest: ExportManifest
) -> Iterator[str]:
    """Check that the weights are integers of as many bits as the scheme has."""
    linear, weight = manifest.config.linear, tensors.get(key)
    if layer.scheme is None or linear is None or weight is None or weight.dtype != torch.int8 or not weight.numel():
        return
    qmin, qmax = WEIGHT_CODES[scheme_of(linear).weight_bits]
    lo, hi = (int(bound) for bound in weight.aminmax())
    if lo < qmin or hi > qmax:
        yield f"{key} must hold integers in [{qmin}, {qmax}] as {linear.kind} has them, but holds {lo} to {hi}"


def _rows_by_name(layer: LayerPlan, manifest: ExportManifest) -> list[tuple[str, int]]:
    """Return the layer's names in the export's layout with their numbers of output rows."""
    if manifest.layout == "original":
        return [(layer.name, sum(layer.out_features))]
    return list(zip(layer.modules, layer.out_features, strict=True))


def _prefix(layer: LayerPlan, name: str) -> str:
    return f"{name}.linear" if layer.has_multiplier else name
