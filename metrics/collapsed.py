"""Is the video broken beyond judging? Seven detectors, each against the reference.

Similarity scores react late and strangely to a video that quantization has ruined, so plain statistics catch it:

    wrong frame count   more or fewer frames than the reference
    not finite          a NaN or infinite pixel
    black               frames without light where the reference has some
    flat                frames without contrast (grey) where the reference has some
    frozen              a stretch without motion where the reference moves
    tile mosaic         edges along a grid of blocks that starts in the frame's corner, where the reference has no grid
    noise               far more fine structure than the reference, in pixels or in blocks of 2 or 4 pixels

Every rule compares with the reference: a prompt may ask for a black, still, tiled or grainy video. Each asks for a
share of the frames, so that a clip whose last third is ruined is found. Thresholds are far from good videos on purpose;
finer damage is for the other metrics.

    T frames   C colours   H, W height, width   S steps from frame to frame   L lines between pixels of a side
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder
from metrics.luma import luma
from metrics.motion_energy_ratio import STILL

Collapse = Literal["wrong frame count", "not finite", "black", "flat", "frozen", "tile mosaic", "noise"]

RUINED_FRAMES = 0.25  # share of the frames that must be black, flat, tiled or noise
BLACK_LUMA = 0.04  # mean of a frame; ten levels of 8 bits
BLACK_SHARE_OF_REFERENCE = 0.25
FLAT_CONTRAST = 0.02  # standard deviation within a frame; one of 0.5 is black and white halves
FLAT_SHARE_OF_REFERENCE = 0.25
FROZEN_SHARE_OF_REFERENCE = 0.1
FROZEN_STRETCH = 1 / 3  # of the steps in which the reference moves
FROZEN_STEPS = 3  # a stretch is at least as long, or all of them
TILE_BLOCKS = (8, 16, 32, 64)  # pixels; latent cells and patches of video models, decoded
TILE_STEP = 0.02  # mean absolute difference across a line of the grid
TILE_TIMES_INSIDE = 2.0
TILE_TIMES_REFERENCE = 2.0
TILE_LINES = 0.25  # all but this share of the grid's lines must be edges
NOISE_FLOOR = 0.01  # fine energy of white noise with standard deviation 0.11
NOISE_TIMES_REFERENCE = 3.0
NOISE_BLOCKS = (1, 2, 4)  # pixels


def collapse_reason(video: Tensor, reference: Tensor) -> Collapse | None:
    """Name the first detector that fires, or None for a video that can be judged.

    Args:
        video: [T, 3, H, W] float in [0, 1], the candidate.
        reference: The float video of the same prompt and seed; the same shape, but for T.
    """
    video, reference = video.float(), reference.float()
    return next((reason for reason, is_broken in DETECTORS.items() if is_broken(video, reference)), None)


def describe_collapses(samples: Sequence[Sample]) -> str:
    """Return in words which detectors fired in how many videos, "" if none did: "black in 2 of 8 videos"."""
    reasons = Counter(collapse_reason(sample.video, sample.reference) for sample in samples)
    del reasons[None]
    return ", ".join(f"{reason} in {count} of {len(samples)} videos" for reason, count in reasons.most_common())


def collapsed(sample: Sample, embedder: Embedder) -> float:
    """Return 1 if any detector fires, else 0."""
    return float(collapse_reason(sample.video, sample.reference) is not None)


def _has_wrong_frame_count(video_TCHW: Tensor, reference_TCHW: Tensor) -> bool:
    return len(video_TCHW) != len(reference_TCHW)


def _is_not_finite(video_TCHW: Tensor, reference_TCHW: Tensor) -> bool:
    return not bool(torch.isfinite(video_TCHW).all())


def _is_black(video_TCHW: Tensor, reference_TCHW: Tensor) -> bool:
    light_T, reference_light_T = (luma(video).mean(dim=(1, 2)) for video in (video_TCHW, reference_TCHW))
    return _are_ruined((light_T < BLACK_LUMA) & (light_T < BLACK_SHARE_OF_REFERENCE * reference_light_T))


def _is_flat(video_TCHW: Tensor, reference_TCHW: Tensor) -> bool:
    contrast_T, reference_contrast_T = (video.flatten(1).std(dim=1) for video in (video_TCHW, reference_TCHW))
    return _are_ruined((contrast_T < FLAT_CONTRAST) & (contrast_T < FLAT_SHARE_OF_REFERENCE * reference_contrast_T))


def _is_frozen(video_TCHW: Tensor, reference_TCHW: Tensor) -> bool:
    motion_S, reference_motion_S = (
        video.diff(dim=0).abs().mean(dim=(1, 2, 3)) for video in (video_TCHW, reference_TCHW)
    )
    moves_S = reference_motion_S >= STILL
    num_moves = int(moves_S.sum())
    if not num_moves or num_moves < FROZEN_STRETCH * len(moves_S):
        return False
    is_still_S = (motion_S < FROZEN_SHARE_OF_REFERENCE * reference_motion_S)[moves_S]
    stretch = max((len(list(run)) for is_still, run in groupby(is_still_S.tolist()) if is_still), default=0)
    return stretch >= max(FROZEN_STRETCH * num_moves, min(FROZEN_STEPS, num_moves))


def _is_tiled(video_TCHW: Tensor, reference_TCHW: Tensor) -> bool:
    if min(video_TCHW.shape[-2:]) < 3 * min(TILE_BLOCKS):
        return False
    steps, reference_steps = _line_steps(video_TCHW), _line_steps(reference_TCHW)
    blocks = [block for block in TILE_BLOCKS if min(video_TCHW.shape[-2:]) >= 3 * block]
    return any(_are_ruined(_shows_grid(steps, reference_steps, block)) for block in blocks)


def _line_steps(video_TCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean absolute difference across each vertical and each horizontal line between pixels: [T, L] each."""
    return video_TCHW.diff(dim=3).abs().mean(dim=(1, 2)), video_TCHW.diff(dim=2).abs().mean(dim=(1, 3))


def _shows_grid(steps: tuple[Tensor, Tensor], reference_steps: tuple[Tensor, Tensor], block: int) -> Tensor:
    """Return for each frame whether both directions have edges along the grid of blocks: [T] bool."""
    is_edge = []
    for step_TL, reference_TL in zip(steps, reference_steps, strict=True):
        on_grid_T = _grid_step(step_TL, block, block - 1)
        is_inside_L = torch.arange(1, step_TL.shape[1] + 1, device=step_TL.device) % block != 0
        inside_T = step_TL[:, is_inside_L].mean(dim=1)
        reference_T = torch.stack([_grid_step(reference_TL, block, first) for first in range(block)]).amax(dim=0)
        limits_T = torch.maximum(TILE_TIMES_INSIDE * inside_T, TILE_TIMES_REFERENCE * reference_T)
        is_edge.append(on_grid_T > limits_T.clamp(min=TILE_STEP))
    return is_edge[0] & is_edge[1]


def _grid_step(step_TL: Tensor, block: int, first: int) -> Tensor:
    """Return the step that all but a quarter of the lines first, first + block, ... exceed: [T]."""
    return step_TL[:, first::block].quantile(TILE_LINES, dim=1, interpolation="lower")


def _is_noise(video_TCHW: Tensor, reference_TCHW: Tensor) -> bool:
    sides = video_TCHW.shape[-2:]
    return any(
        _are_ruined(
            fine_energy(video_TCHW, block) > NOISE_FLOOR + NOISE_TIMES_REFERENCE * fine_energy(reference_TCHW, block)
        )
        for block in NOISE_BLOCKS
        if min(sides) // block >= 3
    )


def fine_energy(video_TCHW: Tensor, block: int) -> Tensor:
    """Return the mean squared difference between blocks of pixels and the mean of their 3 x 3 neighbourhood, per frame.

    White noise of variance v has 8 v / 9 at block 1.

    Args:
        video_TCHW: [T, C, H, W]; H and W at least 3 * block.
        block: Side in pixels of the blocks that are averaged first.

    Returns:
        [T] float.
    """
    blocks = F.avg_pool2d(video_TCHW, block) if block > 1 else video_TCHW
    residual = blocks[..., 1:-1, 1:-1] - F.avg_pool2d(blocks, 3, stride=1)
    return residual.square().mean(dim=(1, 2, 3))


def _are_ruined(is_ruined_T: Tensor) -> bool:
    return float(is_ruined_T.float().mean()) >= RUINED_FRAMES


DETECTORS: dict[Collapse, Callable[[Tensor, Tensor], bool]] = {
    "wrong frame count": _has_wrong_frame_count,
    "not finite": _is_not_finite,
    "black": _is_black,
    "flat": _is_flat,
    "frozen": _is_frozen,
    "tile mosaic": _is_tiled,
    "noise": _is_noise,
}

COLLAPSED = MetricSpec(
    name="collapsed",
    direction="minimize",
    unit="0 or 1",
    range=(0.0, 1.0),
    needs=("video", "reference"),
    looks_at="frames, steps between them, and blocks of pixels, by seven detectors",
    blind_to="A sharp, moving, colourful video of the wrong thing, and every damage short of ruin.",
    cost="low",
    function=collapsed,
    of_itself=0.0,
    judges_ruins=True,
)
