"""Rights and room to write, asked for before hours of rendering, and what a disk says all the same in one sentence."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyquant.models.base import RenderSettings
from search.errors import SearchError

_SPARE_BYTES = 64 * 2**20


def clip_bytes(settings: RenderSettings) -> int:
    """Return the size of one clip as it is kept: float32 [T, C, H, W] with three channels."""
    return settings.num_frames * 3 * settings.height * settings.width * 4


def require_writable(folder: Path) -> None:
    """Refuse a folder that may not be written to.

    Raises:
        SearchError: If this process lacks the right.
    """
    if not os.access(folder, os.W_OK):
        raise SearchError(
            f"a certificate is written into the export's folder, but {folder} is read-only; make it writable or "
            "certify a copy"
        )


def require_room(folder: Path, settings: RenderSettings, num_clips: int) -> None:
    """Make a folder, and refuse a disk that cannot take so many clips.

    Raises:
        SearchError: If the folder cannot be made, or too little is free.
    """
    needed = num_clips * clip_bytes(settings)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if num_clips > 0 and free < needed + _SPARE_BYTES:
        raise SearchError(
            f"{num_clips} clips take about {needed / 2**20:.0f} MiB, but {folder} has {free / 2**20:.0f} MiB free; "
            "make room or give another --store"
        )


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn what a file system says into one sentence about a folder.

    Raises:
        SearchError: If anything in the block raises OSError.
    """
    try:
        yield
    except OSError as error:
        raise SearchError(
            f"{folder} must be a writable folder on a disk with room, but: {error}; free or move it"
        ) from error
