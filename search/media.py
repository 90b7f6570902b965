"""What a trial leaves to look at: videos and frames, float and quantized side by side; and its values as JSON."""

import json
import logging
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from PIL import Image

from hyquant.video.mp4 import CODEC, encode_mp4, has_encoder
from search.errors import InstallError
from search.frames import Pixels, comparison_frames, strip_image
from search.plain import plain

if TYPE_CHECKING:
    from hyquant.plan import QuantPlan
    from hyquant.quantize import QuantReport
    from metrics.base import Sample
    from search.result import TrialResult

logger = logging.getLogger(__name__)

_MIN_PLAY_S = 4.0
_SHOWN_SAMPLES = 8
_PNG_LEVEL = 3  # every trial pays for its pictures: as small as with optimize=True, in a thirtieth of the time


def write_trial_files(
    folder: Path,
    result: "TrialResult",
    *,
    plan: "QuantPlan | None",
    report: "QuantReport | None",
    samples: Sequence["Sample"],
) -> None:
    """Write a trial's artifacts into an existing folder; parts that the trial did not reach are left out.

    config.json, config.yaml, result.json, plan.json, report.json (per layer), videos.mp4, strip.png.

    Args:
        folder: Where to write.
        result: What the trial found out.
        plan: What was decided for every layer.
        report: What happened to every layer.
        samples: Rendered clips with their float references, of one size; the first eight are shown.
    """
    config = result.config.model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    values = {"config": result.config, "result": result, "plan": plan, "report": report}
    for name, value in values.items():
        if value is not None:
            text = json.dumps(plain(value), indent=2, ensure_ascii=False)
            (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    if samples:
        write_videos(folder, samples)


def written_trial_files(
    folder: Path,
    result: "TrialResult",
    *,
    plan: "QuantPlan | None",
    report: "QuantReport | None",
    samples: Sequence["Sample"],
) -> Path | None:
    """Do what `write_trial_files` does and return the folder; None, after a warning, if the disk refuses.

    The trial is in Optuna by then: a full disk costs its pictures, not its worker.
    """
    try:
        write_trial_files(folder, result, plan=plan, report=report, samples=samples)
    except OSError as error:
        logger.warning("a trial's files need room in %s, but: %s; free some, the trial goes without", folder, error)
        return None
    return folder


def write_videos(folder: Path, samples: Sequence["Sample"]) -> None:
    """Write videos.mp4 and strip.png of the first eight samples into an existing folder."""
    shown = samples[:_SHOWN_SAMPLES]
    write_mp4(folder / "videos.mp4", comparison_frames(shown), fps=frame_rate(shown[0].video.shape[0]))
    Image.fromarray(strip_image(shown)).save(folder / "strip.png", compress_level=_PNG_LEVEL)


def frame_rate(num_frames: int) -> int:
    """Return the playing speed in frames per second: 24, HunyuanVideo's own, or 8 for clips too short for it."""
    return 24 if num_frames > 48 else 8


def write_mp4(path: Path, frames: Pixels, *, fps: int) -> None:
    """Write an H.264 video in 4:2:0 that browsers play; clips shorter than four seconds are repeated.

    Args:
        path: File to write.
        frames: uint8 [T, H, W, 3] with even H and W.
        fps: Frames per second.

    Raises:
        InstallError: If PyAV was built without an H.264 encoder.
    """
    if not has_encoder():
        raise InstallError(
            f"PyAV must have the encoder {CODEC}, but version {version('av')} has not; "
            "install its wheel from PyPI (pip install --force-reinstall av)."
        )
    repeats = max(1, math.ceil(_MIN_PLAY_S * fps / len(frames)))
    shown = (np.ascontiguousarray(frame) for _ in range(repeats) for frame in frames)
    height, width = frames.shape[1:3]
    encode_mp4(path, shown, size=(height, width), fps=fps, options={"crf": "20", "preset": "ultrafast"})
