"""Clips from an export, beside the float model's clips of the same prompts and seeds."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hyquant.errors import ConfigError
from hyquant.export import load_quantized, read_manifest
from hyquant.models import load_model, require_frames
from hyquant.models.base import RenderSettings, VideoModel
from hyquant.quantize import restore_
from metrics.base import Sample
from search.clip_space import writing_to
from search.errors import SearchError
from search.media import write_videos

_SMALL_MODELS = ("mini", "mini-outliers")


def load_float_model(export: Path, *, source: str | None = None, device: str = "auto") -> VideoModel:
    """Load the float model an export was made from.

    Args:
        export: Folder of the export.
        source: Where the weights are on this machine, if not where the manifest says.
        device: "auto", or a device as torch writes it.

    Raises:
        HyquantError: If the folder is no export, or the model cannot be loaded.
    """
    info = read_manifest(export).model
    return load_model(info.kind, source or info.source, device=device, dtype=info.dtype)


def clip_settings(export: Path, *, size: str | None, num_frames: int | None) -> RenderSettings:
    """Return the settings to render with: the export's steps, and the given or the model's usual clip.

    Args:
        export: Folder of the export.
        size: "WIDTHxHEIGHT" in pixels; by default 64x64 for the shipped models and 832x480 otherwise.
        num_frames: Frames of the clip; by default 13 and 33.

    Raises:
        ConfigError: If the size is not of that form or breaks a rule of the model.
        ExportError: If the folder is no export.
    """
    manifest = read_manifest(export)
    is_small = manifest.model.kind == "tiny" or manifest.model.source in _SMALL_MODELS
    text = size or ("64x64" if is_small else "832x480")
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) % 16 == 0 and int(height) % 16 == 0):
        raise ConfigError(
            f"--size must be WIDTHxHEIGHT in multiples of 16 pixels, but got {text!r}; 832x480, for example"
        )
    frames = num_frames or (13 if is_small else 33)
    require_frames(manifest.model.kind, frames)
    return RenderSettings(height=int(height), width=int(width), num_frames=frames, num_steps=manifest.num_steps)


@contextmanager
def made_folder(out: Path) -> Iterator[None]:
    """Make the folder to write into for a block, before anything is loaded and rendered for it.

    If the block fails and has written nothing, a folder that was made for it is removed again.

    Raises:
        SearchError: If it cannot be made or written to.
    """
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(f"--out must be a folder, but {out} cannot be made: {error}; give another --out") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise SearchError(f"--out must be writable, but {out} is not; change its rights or give another --out")
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                out.rmdir()
        raise


def render_export(
    model: VideoModel, export: Path, prompts: Sequence[str], settings: RenderSettings, *, seed: int, out: Path
) -> tuple[Path, ...]:
    """Render prompts with the float and the quantized denoiser, and write videos.mp4 and strip.png.

    Args:
        model: The float model of the export; it is in float again afterwards.
        export: Folder of the export.
        prompts: One clip each.
        settings: Clip and steps.
        seed: Seed of the first clip's noise; each further clip adds one.
        out: Folder to write into (`made_folder`).

    Returns:
        The files written.

    Raises:
        ExportError: If the export cannot be loaded into this model.
        SearchError: If the files cannot be written.
    """
    seeds = [seed + index for index in range(len(prompts))]
    load_quantized(model.denoiser, export, model.clock)
    try:
        videos = model.render(prompts, seeds, settings)
    finally:
        restore_(model.denoiser)
    references = model.render(prompts, seeds, settings)
    samples = [Sample(*parts) for parts in zip(prompts, videos, references, strict=True)]
    with writing_to(out):
        write_videos(out, samples)
    return out / "videos.mp4", out / "strip.png"
