"""Videos as H.264 files, written whole or not at all.

T frames   C = 3 channels   H, W height, width
"""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from hyquant.errors import ExportError
from hyquant.file_modes import FILE_MODE, make_folder
from hyquant.video.mp4 import CODEC, encode_mp4, has_encoder

FRAMES_PER_S = 24
"""HunyuanVideo's own rate."""

_QUALITY = "16"  # constant rate factor: differences to the source are not seen


def require_savable(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Check what `save_video` would refuse, before anything is rendered for it, and make the folders.

    Raises:
        ExportError: If a file exists and may not be replaced, a folder cannot be written, or there is no encoder.
    """
    _require_encoder()
    for folder in {path.parent for path in paths}:
        try:
            make_folder(folder)
        except OSError as error:
            raise ExportError(f"--save-path must be a folder, but {folder} cannot be made: {error}") from error
        if not os.access(folder, os.W_OK):
            raise ExportError(f"--save-path must be writable, but {folder} is not; change its rights or give another")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise ExportError(
            f"a video must not replace another, but {existing[0]} exists ({len(existing)} in all); give another "
            "--save-path, or --overwrite"
        )


def save_video(path: Path, video_TCHW: Tensor) -> None:
    """Write a video that browsers play.

    Args:
        path: File to write; one that is there is replaced.
        video_TCHW: float32 [T, 3, H, W] in [0, 1] with even H and W.

    Raises:
        ExportError: If it cannot be written; nothing is left then.
    """
    pixels_THWC = (video_TCHW.nan_to_num(0.0).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    height, width = pixels_THWC.shape[1:3]
    partial = path.with_name(f".{path.name}.partial")
    try:
        frames = (frame.numpy() for frame in pixels_THWC)
        encode_mp4(partial, frames, size=(height, width), fps=FRAMES_PER_S, options={"crf": _QUALITY})
        partial.chmod(FILE_MODE)
        partial.replace(path)
    except OSError as error:  # PyAV's errors are of this family where the system refused something
        raise ExportError(f"{path} cannot be written: {error}; make room or give another --save-path") from error
    finally:
        partial.unlink(missing_ok=True)


def _require_encoder() -> None:
    try:
        is_there = has_encoder()
    except ImportError as error:
        raise ExportError("videos are written by PyAV, which is not installed; run pip install av") from error
    if not is_there:
        raise ExportError(
            f"PyAV must have the encoder {CODEC}, but this one has not; run pip install --force-reinstall av"
        )
