"""Pictures that put float and quantized videos side by side: pure functions from videos to uint8 images.

    T frames   C = 3 channels   H, W height, width

Videos come in as float32 [T, C, H, W] in [0, 1]; images go out as uint8 [H, W, 3].
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from metrics.base import Sample

Pixels = npt.NDArray[np.uint8]

_BACKGROUND, _INK, _QUIET = (255, 255, 255), (20, 20, 20), (110, 110, 110)
_LABEL_PX, _GAP_PX, _LINE_PX, _FONT_PX = 18, 6, 2, 12
_ROW_LABEL_PX = 72


def to_pixels(video_TCHW: Tensor) -> Pixels:
    """Return a video as uint8 [T, H, W, 3]; values outside [0, 1] are clamped, and NaN becomes black."""
    # numpy, because torch would wake its threads for each of these small operations
    video = video_TCHW.detach().float().cpu().numpy()
    clean = np.clip(np.nan_to_num(video, nan=0.0), 0.0, 1.0)
    return np.ascontiguousarray(np.rint(clean * 255.0).astype(np.uint8).transpose(0, 2, 3, 1))


def resized(frames: Pixels, height: int) -> Pixels:
    """Return frames [T, H, W, 3] scaled to about a height: pixels repeated a whole number of times, or averaged."""
    old_height, old_width = frames.shape[1:3]
    if old_height <= height:
        factor = max(1, round(height / old_height))
        return frames.repeat(factor, axis=1).repeat(factor, axis=2)
    size = (max(1, round(old_width * height / old_height)), height)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])


def comparison_frames(samples: Sequence["Sample"], *, cell_height: int = 192) -> Pixels:
    """Return the frames of one video that plays every float clip beside its quantized one.

    Args:
        samples: Clips of one size; each gets a panel "float | quantized" with its prompt above, or the prompt's number
            where the font lacks a character of it. From three samples on, panels stand in two columns. Both clips of a
            sample are cut to the shorter one, and a panel that ends before others keeps its last frame.
        cell_height: About how many pixels high one clip is; small clips are enlarged a whole number of times.

    Returns:
        uint8 [T, H, W, 3] with even H and W, as 4:2:0 video needs.
    """
    panels = [_panel(sample, label, cell_height) for sample, label in zip(samples, _labels(samples), strict=True)]
    longest = max(len(panel) for panel in panels)
    panels = [np.pad(panel, [(0, longest - len(panel)), (0, 0), (0, 0), (0, 0)], mode="edge") for panel in panels]
    columns = 1 if len(panels) < 3 else 2
    while len(panels) % columns:
        panels.append(np.full_like(panels[0], 255))
    rows = [np.concatenate(panels[i : i + columns], axis=2) for i in range(0, len(panels), columns)]
    frames = np.concatenate(rows, axis=1)
    pad = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    return np.pad(frames, pad, constant_values=255)


def strip_image(samples: Sequence["Sample"], *, num_columns: int = 8, cell_height: int = 96) -> Pixels:
    """Return one picture: for every sample a row of float frames above a row of quantized ones, labelled.

    Frames are taken evenly over the clip, first and last included; of clips of two lengths, up to the end of the
    shorter one. A prompt of which the font lacks a character is shown as its number.
    """
    labelled = zip(samples, _labels(samples), strict=True)
    return np.concatenate([_strip_of(sample, label, num_columns, cell_height) for sample, label in labelled], axis=0)


def frame_indices(num_frames: int, num_columns: int) -> list[int]:
    """Return up to `num_columns` distinct frame indices spread evenly from the first frame to the last."""
    return sorted({round(i) for i in np.linspace(0, num_frames - 1, min(num_columns, num_frames))})


def _labels(samples: Sequence["Sample"]) -> list[str]:
    """Return each prompt as it can be written: itself, or its number, from 1, if the font lacks a character of it."""
    return [
        sample.prompt if all(map(_has_glyph, sample.prompt)) else f"prompt {number}"
        for number, sample in enumerate(samples, start=1)
    ]


@cache
def _has_glyph(character: str) -> bool:
    """Say whether the font draws a character otherwise than one that no font has."""
    font = ImageFont.load_default(_FONT_PX)
    nobodys = "\U0010ffff"
    drawn, missing = font.getmask(character), font.getmask(nobodys)
    return (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


def _both(sample: "Sample") -> tuple[Pixels, Pixels]:
    """Return the float and the quantized clip, both cut to the shorter one: a damaged video may have other frames."""
    num_frames = min(len(sample.reference), len(sample.video))
    return to_pixels(sample.reference[:num_frames]), to_pixels(sample.video[:num_frames])


def _panel(sample: "Sample", label: str, cell_height: int) -> Pixels:
    left, right = (resized(video, cell_height) for video in _both(sample))
    num_frames, height, width = left.shape[:3]
    gap = np.full((num_frames, height, _GAP_PX, 3), 255, dtype=np.uint8)
    picture = np.concatenate([left, gap, right, gap], axis=2)
    header = Image.new("RGB", (picture.shape[2], 2 * _LABEL_PX), _BACKGROUND)
    draw = ImageDraw.Draw(header)
    _write(draw, (2, 2), label, _INK, header.width - 4)
    _write(draw, (2, 2 + _LABEL_PX), "float", _QUIET, width)
    _write(draw, (2 + width + _GAP_PX, 2 + _LABEL_PX), "quantized", _QUIET, width)
    top = np.broadcast_to(np.asarray(header), (num_frames, header.height, header.width, 3))
    return np.concatenate([top, picture], axis=1)


def _strip_of(sample: "Sample", label: str, num_columns: int, cell_height: int) -> Pixels:
    rows = []
    for frames in _both(sample):
        chosen = resized(frames[frame_indices(len(frames), num_columns)], cell_height)
        spaced = np.pad(chosen, [(0, 0), (0, _LINE_PX), (0, _LINE_PX), (0, 0)], constant_values=255)
        rows.append(np.concatenate(list(spaced), axis=1))
    row_height, row_width = rows[0].shape[:2]
    canvas = Image.new("RGB", (_ROW_LABEL_PX + row_width, _LABEL_PX + 2 * row_height + _GAP_PX), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    _write(draw, (2, 2), label, _INK, canvas.width - 4)
    for index, (side, row) in enumerate(zip(("float", "quantized"), rows, strict=True)):
        top = _LABEL_PX + index * row_height
        _write(draw, (2, top + row_height // 2 - _FONT_PX // 2), side, _QUIET, _ROW_LABEL_PX)
        canvas.paste(Image.fromarray(row), (_ROW_LABEL_PX, top))
    return np.asarray(canvas)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, ink: tuple[int, int, int], width: int) -> None:
    """Write one line, shortened with an ellipsis to fit the width."""
    font = ImageFont.load_default(_FONT_PX)
    shown = text
    while len(shown) > 1 and draw.textlength(shown, font=font) > width:
        shown = shown.removesuffix("…")[:-1] + "…"
    draw.text(at, shown, fill=ink, font=font)
