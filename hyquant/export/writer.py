"""`save_quantized`: a quantized denoiser as a folder that an engine loads, written whole or not at all."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from hyquant.config import Target, digest
from hyquant.errors import ExportError
from hyquant.export.folder import check_target, new_folder
from hyquant.export.layout import (
    attention_names,
    describe,
    has_diffusers_names,
    layer_names,
    model_quant_type,
)
from hyquant.export.manifest import (
    ExportManifest,
    FileInfo,
    Layout,
    ModelInfo,
    layer_counts,
    notes,
    read_manifest,
    static_steps,
)
from hyquant.export.names import (
    CERTIFICATE_NAME,
    CERTIFICATE_PAGE_NAME,
    MANIFEST_NAME,
    FileNames,
    default_names,
    index_name,
    require_loadable,
    shards,
)
from hyquant.export.order import unit_tensors, units
from hyquant.export.snippets import mindie_loader
from hyquant.export.tensor_file import write_tensor_file
from hyquant.plan import QuantPlan
from hyquant.quantize import attention_tensors, quantized_tensors
from hyquant.software import software_versions
from hyquant.targets import target_problem

logger = logging.getLogger(__name__)


def save_quantized(
    denoiser: nn.Module,
    plan: QuantPlan,
    out_dir: str | Path,
    *,
    model: ModelInfo | Callable[[], ModelInfo],
    layout: Layout = "original",
    target: Target = "hyquant",
    overwrite: bool = False,
    names: Sequence[FileNames] | None = None,
    part_size_bytes: int | None = None,
) -> ExportManifest:
    """Write a denoiser that was quantized by `plan`: all its tensors, their description and a manifest.

    Args:
        denoiser: The quantized denoiser.
        plan: The plan it was quantized by.
        out_dir: The folder to make; its parent must be writable.
        model: The float model it was made from, by `model_info`; or what gives it, asked once the tensors are written.
        layout: Whose layer names to write; MindIE-SD's own HunyuanVideo has the original ones. A denoiser that is not
            HunyuanVideo in diffusers' layout has "original" names only: its own.
        target: What is meant to execute it.
        overwrite: Replace an export that is there already.
        names: File names of the tensors and their description; several write the same tensors once per pair, such as
            one pair per rank (`hyquant.export.names.for_rank`). None writes the one pair that engines expect.
        part_size_bytes: Most bytes of tensors in one file; more are written as parts with an index, which MindIE-SD
            does not read. None writes one file.

    Raises:
        ExportError: If plan and denoiser disagree, the target cannot load the names, the layout, parts or what is
            folded, or the folder cannot be written; then nothing is left behind and an old export is untouched.
    """
    out_dir = Path(out_dir)
    pairs = tuple(names) if names is not None else (default_names(model_quant_type(plan)),)
    require_writable(
        plan,
        out_dir,
        layout=layout,
        target=target,
        overwrite=overwrite,
        names=pairs,
        part_size_bytes=part_size_bytes,
    )
    tensors = _unshared(_attention_tensors(denoiser, plan, layout) | _tensors(denoiser, plan, layout))
    size_bytes = len(pairs) * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with new_folder(
        out_dir, size_bytes=size_bytes, mark=MANIFEST_NAME, overwrite=overwrite, is_ours=is_export_file
    ) as folder:
        written: dict[str, FileInfo] = {}
        for pair in pairs:
            written |= _write_tensors(folder, pair.weights, tensors, part_size_bytes)
        info = model if isinstance(model, ModelInfo) else model()
        manifest = write_descriptions(
            folder, plan, list(tensors), written, names=pairs, model=info, layout=layout, target=target
        )
    kind = manifest.model_quant_type
    logger.info("export out_dir=%s type=%s layout=%s size_bytes=%d", out_dir, kind, layout, size_bytes)
    return manifest


def write_descriptions(
    folder: Path,
    plan: QuantPlan,
    keys: Sequence[str],
    written: Mapping[str, FileInfo],
    *,
    names: tuple[FileNames, ...],
    model: ModelInfo,
    layout: Layout,
    target: Target,
) -> ExportManifest:
    """Write the small files of an export beside its tensors: a description per pair, and the manifest.

    Args:
        folder: Where they go.
        plan: What was done.
        keys: The names of all tensors.
        written: Size and digest of the tensor files, and of what else was written with them.
        names: The pairs of files.
        model: The float model.
        layout: Whose layer names the tensors bear.
        target: What is meant to execute it.
    """
    quant_type, steps = model_quant_type(plan), static_steps(plan)
    description = describe(list(keys), layer_names(plan, layout), quant_type, attention_names(plan, layout))
    files = dict(written)
    for pair in names:
        files[pair.description] = _write_json(folder / pair.description, json.dumps(description, indent=2))
    manifest = ExportManifest(
        config=plan.config,
        config_digest=digest(plan.config),
        plan=plan,
        target=target,
        layout=layout,
        model=model,
        model_quant_type=quant_type,
        names=names,
        num_steps=plan.num_steps,
        static_steps=steps,
        layer_counts=layer_counts(plan),
        versions=software_versions(),
        files=dict(sorted(files.items())),
        loader=mindie_loader(names[0], plan.config, layout=layout, quant_type=quant_type, static_steps=steps),
        notes=notes(plan),
    )
    _write_json(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2))
    return manifest


def require_writable(
    plan: QuantPlan,
    out_dir: str | Path,
    *,
    layout: Layout = "original",
    target: Target = "hyquant",
    overwrite: bool = False,
    names: Sequence[FileNames] | None = None,
    part_size_bytes: int | None = None,
) -> None:
    """Check what `save_quantized` would refuse, before anything is calibrated for it.

    Args:
        plan: What will be quantized.
        out_dir: The folder to make.
        layout: Whose layer names will be written.
        target: What is meant to execute it.
        overwrite: Whether an export that is there may be replaced.
        names: File names, as for `save_quantized`.
        part_size_bytes: Most bytes of tensors in one file, as for `save_quantized`.

    Raises:
        ExportError: Whatever `save_quantized` would say.
    """
    quant_type = model_quant_type(plan)
    if layout == "diffusers" and target.startswith("mindie-sd"):
        raise ExportError(
            f"{target} loads layers by the original names and leaves all others in float without a message, but layout "
            "is diffusers; use layout original, or target hyquant"
        )
    if (problem := target_problem(plan, target)) is not None:
        raise ExportError(problem)
    if layout == "diffusers" and not has_diffusers_names(plan.layers):
        raise ExportError(
            "only HunyuanVideo in diffusers' layout can be written in its names, but this denoiser has others; use "
            "layout original, which keeps them"
        )
    require_loadable([default_names(quant_type)] if names is None else names, quant_type, target)
    _require_parts(part_size_bytes, target)
    check_target(Path(out_dir), mark=MANIFEST_NAME, overwrite=overwrite, is_ours=is_export_file)


def is_export_file(folder: Path, name: str) -> bool:
    """Tell whether a file in an export's folder belongs to it: its manifest lists it, or it has a default name.

    A certificate belongs to the bytes it was written for: who replaces them replaces it.
    """
    if name in (CERTIFICATE_NAME, CERTIFICATE_PAGE_NAME):
        return True
    if fnmatchcase(name, "quant_model_*.safetensors*") or fnmatchcase(name, "quant_model_*.json"):
        return True
    try:
        return name in read_manifest(folder).files
    except ExportError:
        return False


def _require_parts(part_size_bytes: int | None, target: Target) -> None:
    if part_size_bytes is None:
        return
    if part_size_bytes < 1:
        raise ExportError(
            f"part_size_bytes must be 1 or more, but got {part_size_bytes}; leave it out for a single file"
        )
    if target.startswith("mindie-sd"):
        raise ExportError(
            f"{target} reads one tensor file and no parts, but part_size_bytes is {part_size_bytes}; leave it out, or "
            "use target hyquant"
        )


def _tensors(denoiser: nn.Module, plan: QuantPlan, layout: Layout) -> dict[str, Tensor]:
    """Return all floats and quantized tensors of the denoiser with the names and dtypes of the export, on the CPU."""
    quantized = quantized_tensors(denoiser)
    planned = {module for layer in plan.quantized for module in layer.modules}
    if set(quantized) != planned:
        odd = sorted(set(quantized) ^ planned)
        raise ExportError(
            f"the denoiser must be quantized by the plan that is saved, but they disagree on {odd[:3]} ({len(odd)} in "
            "all); quantize it with this plan first"
        )
    own = tuple(f"{module}." for module in quantized)
    state = {
        key: tensor
        for key, tensor in denoiser.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not key.startswith(own)
    }
    state |= {f"{module}.{kind}": tensor for module, kinds in quantized.items() for kind, tensor in kinds.items()}
    on_cpu = {key: tensor.detach().cpu() for key, tensor in state.items()}
    named: dict[str, Tensor] = {}
    for unit in units(on_cpu, plan):
        named |= unit_tensors({key: on_cpu[key] for key in unit.keys}, unit, plan, layout)
    return named


def _attention_tensors(denoiser: nn.Module, plan: QuantPlan, layout: Layout) -> dict[str, Tensor]:
    """Return what quantized attentions store under the names of the export, on the CPU."""
    held = attention_tensors(denoiser)
    names = attention_names(plan, layout)
    if set(held) != {block.module for block in names.values()}:
        raise ExportError(
            f"the denoiser must be quantized by the plan that is saved, but it has {len(held)} quantized attentions "
            f"and the plan {len(names)}; quantize it with this plan first"
        )
    return {
        f"{name}.{kind}": tensor.detach().cpu().contiguous()
        for name, block in names.items()
        for kind, tensor in held[block.module].items()
    }


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    unshared: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        contiguous = tensor.contiguous()
        address = contiguous.untyped_storage().data_ptr()
        unshared[key] = contiguous.clone() if address in seen else contiguous
        seen.add(address)
    return unshared


def _write_tensors(
    folder: Path, weights: str, tensors: Mapping[str, Tensor], part_size_bytes: int | None
) -> dict[str, FileInfo]:
    """Write one tensor file, or its parts and their index; return size and digest of each file."""
    parts = shards(weights, tensors, part_size_bytes)
    written = {
        name: write_tensor_file(folder / name, {key: tensors[key] for key in keys}) for name, keys in parts.items()
    }
    if len(parts) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        table = {key: name for name, keys in parts.items() for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": table}
        written[index_name(weights)] = _write_json(folder / index_name(weights), json.dumps(index, indent=2))
    return written


def _write_json(path: Path, text: str) -> FileInfo:
    content = f"{text}\n".encode()
    path.write_bytes(content)
    return FileInfo(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
