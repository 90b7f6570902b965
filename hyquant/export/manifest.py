"""What an export says about itself: `hyq_manifest.json`, a frozen value beside the engine's two files."""

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from torch import nn

from hyquant.config import FrozenModel, QuantConfig, StoredRange, Target, W8A8Timestep
from hyquant.errors import ExportError
from hyquant.export.names import MANIFEST_NAME, FileName, FileNames
from hyquant.models.base import VideoModel
from hyquant.models.fingerprint import denoiser_digest_later
from hyquant.modules.swap import swapped
from hyquant.plan import QuantPlan

Layout = Literal["original", "diffusers"]
"""Whose layer names the tensors bear; original ones fuse q, k, v (and the MLP of single blocks) into one layer."""


class ModelInfo(FrozenModel):
    """Which float model was quantized: what `load_model` was called with, and the digests of what it loaded."""

    kind: str
    source: str
    fingerprint: str
    dtype: str


class FileInfo(FrozenModel):
    """Size and SHA-256 of one file."""

    size_bytes: int
    sha256: str


class ExportManifest(FrozenModel):
    """Everything needed to load, check and explain an export.

    Attributes:
        config_digest: What names the config in a study's folders and runs.
        names: The pairs of tensors and description; one, or one per rank with the same tensors.
        static_steps: First and one-past-last step index that use stored activation scales; None if no step does. An
            engine with a step policy, such as MindIE-SD's TimestepPolicyConfig, must be told: it is dynamic
            everywhere by default.
        layer_counts: Number of layers by what happened to them: a scheme's name, "float", "smoothed"; and of blocks
            with quantized attention, as "SCHEME attention".
        files: The other files of the folder, by name.
        loader: Python lines that load the export in MindIE-SD, `export_dir` being its folder; None for diffusers names.
        notes: What whoever deploys this must know, one sentence each.
    """

    format_version: Literal[2] = 2
    config: QuantConfig
    config_digest: str
    plan: QuantPlan
    target: Target
    layout: Layout
    model: ModelInfo
    model_quant_type: str
    names: tuple[FileNames, ...] = Field(min_length=1)
    num_steps: int
    static_steps: tuple[int, int] | None
    layer_counts: dict[str, int]
    versions: dict[str, str]
    files: dict[FileName, FileInfo]
    loader: str | None = None
    notes: tuple[str, ...] = ()


def model_info(model: VideoModel) -> ModelInfo:
    """Describe a video model for the manifest."""
    dtype = str(model.dtype).removeprefix("torch.")
    return ModelInfo(kind=model.kind, source=model.source, fingerprint=model.fingerprint(), dtype=dtype)


def module_info(denoiser: nn.Module, *, source: str) -> ModelInfo:
    """Describe the float denoiser of a pipeline that is no `VideoModel`.

    Args:
        denoiser: The denoiser in float.
        source: What it was loaded from, in words; it is shown when an export meets other weights.

    Raises:
        ExportError: If it is quantized: the digest would not be that of the weights an export is loaded into.
    """
    return module_info_later(denoiser, source=source)()


def module_info_later(denoiser: nn.Module, *, source: str) -> Callable[[], ModelInfo]:
    """Return what computes `module_info` of the denoiser as it is now, whatever modules it has by then.

    Raises:
        ExportError: As `module_info`, at once.
    """
    if swapped(denoiser) is not None:
        raise ExportError("a model is described by its float weights, but this one is quantized; describe it before")
    dtype = str(next(denoiser.parameters()).dtype).removeprefix("torch.")
    digest_now = denoiser_digest_later(denoiser)
    return lambda: ModelInfo(kind="module", source=source, fingerprint=digest_now(), dtype=dtype)


def static_steps(plan: QuantPlan) -> tuple[int, int] | None:
    """Return first and one-past-last step that use stored activation scales; None if no step does."""
    linear = plan.config.linear
    if not isinstance(linear, StoredRange):
        return None
    first = linear.timestep_sep if isinstance(linear, W8A8Timestep) else 0
    return (first, plan.num_steps) if first < plan.num_steps else None


def layer_counts(plan: QuantPlan) -> dict[str, int]:
    """Count layers, and quantized attentions, by what happens to them."""
    schemes = [layer.scheme or "float" for layer in plan.layers]
    attentions = [str(block.scheme) for block in plan.quantized_attentions]
    counts = {name: schemes.count(name) for name in sorted(set(schemes))} | {"smoothed": len(plan.smoothed)}
    return counts | {f"{name} attention": attentions.count(name) for name in sorted(set(attentions))}


def notes(plan: QuantPlan) -> tuple[str, ...]:
    """Return what whoever deploys an export of this plan must know."""
    schemes = {block.scheme for block in plan.quantized_attentions}
    texts = {
        "fa3_int8": "MindIE-SD 3.1 ignores FAQuant entries without a message and runs attention in float; int8 "
        "attention needs its 2.3 line.",
        "fp8_dynamic": "MindIE-SD 3.1 attaches fa_quant to each block but does not reroute its attention: the model's "
        "code must call self.fa_quant(q, k, v, layout=...), on an Ascend 950.",
    }
    return tuple(text for scheme, text in texts.items() if scheme in schemes)


def read_manifest(folder: str | Path) -> ExportManifest:
    """Read an export's manifest.

    Raises:
        ExportError: If the folder is no export, or the manifest is damaged or of another version.
    """
    path = find_manifest(folder)
    try:
        return ExportManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        value = "" if first["type"] == "missing" else f", but got {reprlib.repr(first['input'])}"
        raise ExportError(
            f"{path} must be a manifest of format 2, but {place} is wrong ({first['msg']}{value}); export again"
        ) from error


def find_manifest(folder: str | Path) -> Path:
    """Return the path of an export's manifest.

    Raises:
        ExportError: If the folder is no export.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise ExportError(f"an export is a folder with {MANIFEST_NAME}, but {folder} is none; give what `export` wrote")
    return path
