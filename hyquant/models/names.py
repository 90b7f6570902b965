"""Layer names: HunyuanVideo's original (canonical) ones <-> diffusers', and any other module's own.

One original Linear may be several diffusers Linears ("fused group"): `img_attn_qkv` is to_q, to_k, to_v stacked along
the output rows, in that order; `linear1` of a single block is to_q, to_k, to_v, proj_mlp. Everything here works on
names and structure; neither diffusers nor Tencent's code is imported. The tables are in `hyquant.models.name_tables`.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hyquant.errors import LayerMatchError
from hyquant.models.name_tables import HALVES_SWAPPED, SECTIONS
from hyquant.modules.linear import QuantLinear
from hyquant.schemes.contract import INPUT_TENSORS, ROW_DIMS

Shape: TypeAlias = tuple[int, ...]

_Value = TypeVar("_Value")

_MARK = "context_embedder.proj_in"
"""A Linear that HunyuanVideo has in diffusers; models that share its block names alone do not."""


@dataclass(frozen=True)
class LayerGroup:
    """One canonical Linear and the Linears of the denoiser that it consists of.

    Attributes:
        name: Canonical name, as in `double_blocks.3.img_mlp.fc1`: the original one for HunyuanVideo, the module path
            for every other module.
        modules: Module paths in the denoiser, in the order of their output rows.
        in_features: Input channels, shared by all members (they read the same tensor).
        out_features: Output channels of each member.
        has_bias: Whether a member has a bias.
    """

    name: str
    modules: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    has_bias: bool = True


def layer_groups(denoiser: nn.Module) -> tuple[LayerGroup, ...]:
    """Return every Linear of a denoiser under its canonical name.

    A denoiser whose Linears all have a name in the diffusers tables is HunyuanVideo in diffusers' layout: groups get
    the original names, and several Linears may form one. In every other module, HunyuanVideo in Tencent's own layout
    included, each Linear is a group of its own and its module path is its name.

    Args:
        denoiser: Any module, float or quantized (on any device, also "meta").

    Returns:
        Groups in model order, HunyuanVideo's double and single blocks before what is outside of them.

    Raises:
        LayerMatchError: If a fused group is incomplete, or there is no Linear below the module.
    """
    linears = {name: module for name, module in denoiser.named_modules() if name and _can_be_replaced(module)}
    if not linears:
        raise LayerMatchError(
            f"a denoiser must have Linears below it, but {type(denoiser).__name__} has none; give the module that is "
            "called once per denoising step."
        )
    if _is_diffusers(linears):
        table = _matched(linears, of="diffusers")
    else:
        table = {name: (name,) for name in (*_matched(linears, of="original"), *linears)}
    return tuple(
        LayerGroup(
            name=name,
            modules=paths,
            in_features=int(linears[paths[0]].in_features),
            out_features=tuple(int(linears[path].out_features) for path in paths),
            has_bias=any(_has_bias(linears[path]) for path in paths),
        )
        for name, paths in table.items()
    )


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a diffusers state dict, float or quantized, to original names.

    Rows of fused groups are concatenated in row order and the halves of the final modulation are swapped. The tensors
    of quantized layers (`hyquant.schemes.contract`) convert too: those of the input are taken once per group.

    Args:
        state: Tensors by "module path.tensor name" in diffusers naming.

    Returns:
        The same numbers under original names, in the order of the original's sections.

    Raises:
        LayerMatchError: If a key has no original name or a fused group is incomplete.
        ValueError: If a tensor that the members of a group share differs between them.
    """
    modules = by_module(state)
    table = _matched(modules, of="diffusers")
    _refuse_unknown(modules, (path for paths in table.values() for path in paths), of="diffusers")
    original: dict[str, Tensor] = {}
    for name, paths in table.items():
        for kind in modules[paths[0]]:
            joined = _join(name, kind, [modules[path][kind] for path in paths if kind in modules[path]], len(paths))
            original[f"{name}.{kind}"] = _swap_halves(joined, kind) if name in HALVES_SWAPPED else joined
    return original


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert an original state dict, float or quantized, to diffusers names; the exact inverse of `to_original`.

    Args:
        state: Tensors by "module.tensor name" in original naming; a fused module must come with its `weight`, whose
            shape says where its rows are split.

    Returns:
        The same numbers under diffusers names. Tensors that describe a group's input are one object for all members.

    Raises:
        LayerMatchError: If a key has no diffusers name or a fused module has no weight.
    """
    modules = by_module(state)
    table = _matched(modules, of="original")
    _refuse_unknown(modules, table, of="original")
    diffusers: dict[str, Tensor] = {}
    for name, paths in table.items():
        weight = modules[name].get("weight")
        rows = _rows(name, None if weight is None else tuple(weight.shape), len(paths))
        for kind, tensor in modules[name].items():
            whole = _swap_halves(tensor, kind) if name in HALVES_SWAPPED else tensor
            for path, part in zip(paths, _split(whole, kind, rows), strict=True):
                diffusers[f"{path}.{kind}"] = part
    return diffusers


def float_rows(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, tuple[tuple[int, int], ...]]]:
    """Return where the rows of diffusers tensors lie in the tensors of a float checkpoint in original naming.

    So `to_diffusers` can be done while reading, without holding an original tensor.

    Args:
        shapes: Shapes by "module.weight" or "module.bias" in original naming; a fused module must come with its weight.

    Returns:
        Diffusers key -> original key and the runs of its rows (start, stop) that the diffusers tensor consists of.

    Raises:
        LayerMatchError: As `to_diffusers`.
    """
    modules = by_module(shapes)
    table = _matched(modules, of="original")
    _refuse_unknown(modules, table, of="original")
    found: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {}
    for name, paths in table.items():
        weight = modules[name].get("weight")
        for kind, shape in modules[name].items():
            total = shape[0]
            if name in HALVES_SWAPPED:
                found[f"{paths[0]}.{kind}"] = f"{name}.{kind}", ((total // 2, total), (0, total // 2))
                continue
            start = 0
            for path, rows in zip(paths, _rows(name, weight, len(paths)), strict=True):
                stop = start + rows if len(paths) > 1 else total
                found[f"{path}.{kind}"] = f"{name}.{kind}", ((start, stop),)
                start = stop
    return found


def _can_be_replaced(module: nn.Module) -> bool:
    """Return whether a module is a Linear that runs by being called; some of torch's own only lend their weight."""
    return isinstance(module, nn.Linear | QuantLinear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _has_bias(module: nn.Module) -> bool:
    return module.has_bias if isinstance(module, QuantLinear) else module.bias is not None


def _is_diffusers(names: Collection[str]) -> bool:
    known = {path for _, paths in _entries(names, of="diffusers") for path in paths}
    return _MARK in names and known.issuperset(names)


def by_module(state: Mapping[str, _Value]) -> dict[str, dict[str, _Value]]:
    """Return the tensors of a state dict, or what is known of them, by module path and name in the module."""
    modules: dict[str, dict[str, _Value]] = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        modules.setdefault(module, {})[kind] = value
    return modules


def _matched(names: Iterable[str], *, of: str) -> dict[str, tuple[str, ...]]:
    """Return original -> diffusers modules for those table entries whose own side (`of`) is among the names."""
    known = set(names)
    matched: dict[str, tuple[str, ...]] = {}
    for name, paths in _entries(known, of=of):
        own = (name,) if of == "original" else paths
        missing = sorted(set(own) - known)
        if missing and len(missing) < len(own):
            raise LayerMatchError(
                f"all parts of {name} must be there, but {missing} are missing; give a complete model."
            )
        if not missing:
            matched[name] = paths
    return matched


def _entries(names: Iterable[str], *, of: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield original -> diffusers modules of all table entries, for the block indices that occur among the names."""
    known = set(names)
    for section in SECTIONS:
        prefix = section.original if of == "original" else section.diffusers
        for index in _block_indices(known, prefix):
            for original, parts in section.modules.items():
                yield (
                    section.original.format(index) + original,
                    tuple(section.diffusers.format(index) + part for part in parts),
                )


def _block_indices(names: Iterable[str], prefix: str) -> list[int]:
    """Return the block indices that occur below a prefix; [0] for a prefix without one."""
    if "{}" not in prefix:
        return [0]
    stem = prefix.removesuffix("{}.")
    heads = (name.removeprefix(stem).partition(".")[0] for name in names if name.startswith(stem))
    return sorted({int(head) for head in heads if head.isdigit()})


def _refuse_unknown(names: Iterable[str], known: Iterable[str], *, of: str) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise LayerMatchError(
            f"every module must have a name in HunyuanVideo's tables, but {unknown[:3]} ({len(unknown)} in all) have "
            f"none on the {of} side; is this a HunyuanVideo denoiser in {of} naming?"
        )


def _join(name: str, kind: str, parts: list[Tensor], expected: int) -> Tensor:
    if len(parts) < expected:
        raise LayerMatchError(f"all {expected} parts of {name} must have '{kind}', but only {len(parts)} have it.")
    if len(parts) == 1:
        return parts[0]
    if kind in ROW_DIMS:
        return torch.cat(parts, dim=ROW_DIMS[kind])
    if any(not torch.equal(parts[0], part) for part in parts[1:]):
        raise ValueError(f"the parts of {name} must share one '{kind}', but they differ; quantize them as one group.")
    return parts[0]


def _split(tensor: Tensor, kind: str, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
    if len(rows) == 1 or kind in INPUT_TENSORS:
        return (tensor,) * len(rows)
    return tuple(part.contiguous() for part in tensor.split_with_sizes(rows, dim=ROW_DIMS[kind]))


def _rows(name: str, weight: Shape | None, num_parts: int) -> tuple[int, ...]:
    """Return the output rows of each part: q, k, v have one per input channel, the MLP has the rest."""
    if num_parts == 1:
        return (0,)
    if weight is None or len(weight) != 2:
        raise LayerMatchError(
            f"{name} must come with its weight [N, K], which says where its rows are split, but there is "
            f"{'none' if weight is None else list(weight)}; give both."
        )
    total, hidden = weight
    return (hidden,) * 3 if num_parts == 3 else (hidden,) * 3 + (total - 3 * hidden,)


def _swap_halves(tensor: Tensor, kind: str) -> Tensor:
    if kind not in ROW_DIMS:
        return tensor
    first, second = tensor.chunk(2, dim=ROW_DIMS[kind])
    return torch.cat((second, first), dim=ROW_DIMS[kind])
