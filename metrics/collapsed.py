"""Is the video broken beyond judging? Four detectors, each against the reference.

Similarity scores react late and strangely to a video that quantization has ruined, so plain statistics catch it:

    not finite   a NaN or infinite pixel
    flat         frames without contrast (black, grey) where the reference has some
    frozen       no motion where the reference moves
    noise        far more fine structure than the reference, in pixels or in blocks of 2 or 4 pixels

Every rule compares with the reference: a prompt may ask for a black, still or grainy video. Thresholds are far from
good videos on purpose; finer damage is for the other metrics.

    T frames   C colours   H, W height, width
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder
from metrics.motion_energy_ratio import STILL, motion_energy

Collapse = Literal["not finite", "flat", "frozen", "noise"]

FLAT_CONTRAST = 0.02  # standard deviation within a frame; one of 0.5 is black and white halves
FLAT_SHARE_OF_REFERENCE = 0.25
FLAT_FRAMES = 0.25  # share of the frames that must be flat
FROZEN_SHARE_OF_REFERENCE = 0.1
NOISE_FLOOR = 0.01  # fine energy of white noise with standard deviation 0.11
NOISE_TIMES_REFERENCE = 3.0
NOISE_BLOCKS = (1, 2, 4)  # pixels


def collapse_reason(video: Tensor, reference: Tensor) -> Collapse | None:
    """Name the first detector that fires, or None for a video that can be judged.

    Args:
        video: [T, C, H, W] float in [0, 1], the candidate.
        reference: The same shape, the float video of the same prompt and seed.
    """
    video, reference = video.float(), reference.float()
    return next((reason for reason, is_broken in DETECTORS.items() if is_broken(video, reference)), None)


def collapsed(sample: Sample, embedder: Embedder) -> float:
    """Return 1 if any detector fires, else 0."""
    return float(collapse_reason(sample.video, sample.reference) is not None)


def _is_not_finite(video_TCHW: Tensor, reference_TCHW: Tensor) -> bool:
    return not bool(torch.isfinite(video_TCHW).all())


def _is_flat(video_TCHW: Tensor, reference_TCHW: Tensor) -> bool:
    contrast_T = video_TCHW.flatten(1).std(dim=1)
    reference_contrast_T = reference_TCHW.flatten(1).std(dim=1)
    is_flat_T = (contrast_T < FLAT_CONTRAST) & (contrast_T < FLAT_SHARE_OF_REFERENCE * reference_contrast_T)
    return float(is_flat_T.float().mean()) >= FLAT_FRAMES


def _is_frozen(video_TCHW: Tensor, reference_TCHW: Tensor) -> bool:
    reference_energy = motion_energy(reference_TCHW)
    return reference_energy >= STILL and motion_energy(video_TCHW) < FROZEN_SHARE_OF_REFERENCE * reference_energy


def _is_noise(video_TCHW: Tensor, reference_TCHW: Tensor) -> bool:
    sides = video_TCHW.shape[-2:]
    return any(
        fine_energy(video_TCHW, block) > NOISE_FLOOR + NOISE_TIMES_REFERENCE * fine_energy(reference_TCHW, block)
        for block in NOISE_BLOCKS
        if min(sides) // block >= 3
    )


def fine_energy(video_TCHW: Tensor, block: int) -> float:
    """Return the mean squared difference between blocks of pixels and the mean of their 3 x 3 neighbourhood.

    White noise of variance v has 8 v / 9 at block 1.

    Args:
        video_TCHW: [T, C, H, W]; H and W at least 3 * block.
        block: Side in pixels of the blocks that are averaged first.
    """
    blocks = F.avg_pool2d(video_TCHW, block) if block > 1 else video_TCHW
    residual = blocks[..., 1:-1, 1:-1] - F.avg_pool2d(blocks, 3, stride=1)
    return float(residual.square().mean())


DETECTORS: dict[Collapse, Callable[[Tensor, Tensor], bool]] = {
    "not finite": _is_not_finite,
    "flat": _is_flat,
    "frozen": _is_frozen,
    "noise": _is_noise,
}

COLLAPSED = MetricSpec(
    name="collapsed",
    direction="minimize",
    unit="0 or 1",
    range=(0.0, 1.0),
    needs=("video", "reference"),
    looks_at="pixel statistics of frames, steps and blocks",
    blind_to="A sharp, moving, colourful video of the wrong thing, and every damage short of ruin.",
    cost="low",
    function=collapsed,
    of_itself=0.0,
)
