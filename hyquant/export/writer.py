"""`save_quantized`: a quantized denoiser as a folder that an engine loads, written whole or not at all."""

import errno
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from hyquant.config import Target
from hyquant.errors import ExportError
from hyquant.export.folder import new_folder, sha256_of
from hyquant.export.layout import (
    attention_names,
    deployed,
    describe,
    description_name,
    has_diffusers_names,
    is_renamed,
    layer_names,
    model_quant_type,
    weight_name,
)
from hyquant.export.manifest import (
    MANIFEST_NAME,
    ExportManifest,
    FileInfo,
    Layout,
    ModelInfo,
    layer_counts,
    notes,
    software_versions,
    static_steps,
)
from hyquant.plan import QuantPlan, attention_problem, fold_problem
from hyquant.quantize import attention_tensors, quantized_tensors

logger = logging.getLogger(__name__)


def save_quantized(
    denoiser: nn.Module,
    plan: QuantPlan,
    out_dir: str | Path,
    *,
    model: ModelInfo,
    layout: Layout = "original",
    target: Target = "hyquant",
    overwrite: bool = False,
) -> ExportManifest:
    """Write a denoiser that was quantized by `plan`: all its tensors, their description and a manifest.

    Args:
        denoiser: The quantized denoiser.
        plan: The plan it was quantized by.
        out_dir: The folder to make; its parent must be writable.
        model: The float model it was made from, by `model_info`.
        layout: Whose layer names to write; MindIE-SD's own HunyuanVideo has the original ones. A denoiser that is not
            HunyuanVideo in diffusers' layout has "original" names only: its own.
        target: What is meant to execute it.
        overwrite: Replace an export that is there already.

    Raises:
        ExportError: If plan and denoiser disagree, the target cannot load the layout or what is folded, or the
            folder cannot be written; then nothing is left behind and an old export is untouched.
    """
    quant_type = model_quant_type(plan)
    if layout == "diffusers" and target.startswith("mindie-sd"):
        raise ExportError(
            f"{target} loads layers by the original names and leaves all others in float without a message, but layout "
            "is diffusers; use layout original, or target hyquant"
        )
    if (problem := fold_problem(plan, target) or attention_problem(plan, target)) is not None:
        raise ExportError(problem)
    if layout == "diffusers" and not has_diffusers_names(plan):
        raise ExportError(
            f"only HunyuanVideo in diffusers' layout can be written in its names, but {type(denoiser).__name__} has "
            "others; use layout original, which keeps them"
        )
    tensors = _tensors(denoiser, plan, layout) | _attention_tensors(denoiser, plan, layout)
    description = describe(list(tensors), layer_names(plan, layout), quant_type, attention_names(plan, layout))
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    out_dir = Path(out_dir)
    with new_folder(out_dir, size_bytes=size_bytes, mark=MANIFEST_NAME, overwrite=overwrite) as folder:
        _write_tensors(folder / weight_name(quant_type), tensors)
        _write_json(folder / description_name(quant_type), json.dumps(description, indent=2))
        manifest = ExportManifest(
            config=plan.config,
            plan=plan,
            target=target,
            layout=layout,
            model=model,
            model_quant_type=quant_type,
            num_steps=plan.num_steps,
            static_steps=static_steps(plan),
            layer_counts=layer_counts(plan),
            versions=software_versions(),
            files={file.name: _file_info(file) for file in sorted(folder.iterdir())},
            notes=notes(plan),
        )
        _write_json(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2))
    logger.info("export out_dir=%s type=%s layout=%s size_bytes=%d", out_dir, quant_type, layout, size_bytes)
    return manifest


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
    named = deployed(
        {key: tensor.detach().cpu() for key, tensor in state.items()},
        list(layer_names(plan, layout)),
        renamed=is_renamed(plan, layout),
        deploy_dtype=plan.config.deploy_dtype,
    )
    return _unshared(named)


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


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        is_full = "no space left" in str(error).lower()
        raise OSError(errno.ENOSPC if is_full else errno.EIO, str(error)) from error


def _write_json(path: Path, text: str) -> None:
    path.write_text(f"{text}\n", encoding="utf-8")


def _file_info(path: Path) -> FileInfo:
    return FileInfo(size_bytes=path.stat().st_size, sha256=sha256_of(path))
