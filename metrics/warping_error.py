"""Does texture travel with what moves? Error between frames once motion is taken out, beside that of the float video.

Optical flow of the reference says where each pixel goes. Both videos are warped along it, so that a candidate cannot
hide behind a flow of its own. Pixels that are covered in the next frame, or leave it, are not counted.

Source: Lai et al., Learning Blind Video Temporal Consistency (arXiv:1808.00449), E_warp, with absolute instead of
squared errors. Covered pixels: Sundaram, Brox and Keutzer, Dense Point Trajectories by GPU-Accelerated Large
Displacement Optical Flow (2010), eq. 5. Flow: Kroeger et al., Fast Optical Flow using Dense Inverse Search
(arXiv:1603.03590), as OpenCV has it.

    T frames   C colours   H, W height, width   U (x, y) in pixels
"""

from typing import Any

import numpy as np
from torch import Tensor

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder
from metrics.errors import MetricError
from metrics.luma import luma

SMALLEST_SIDE = 16  # pixels; OpenCV's flow needs patches of 8 at half size

Array = np.ndarray[Any, Any]


def warping_error(sample: Sample, embedder: Embedder) -> float:
    """Return the video's mean absolute error along the reference's motion, less the reference's own, in [-1, 1].

    0 where no pixel can be followed, and for a single frame.

    Raises:
        MetricError: If a side is below 16 pixels.
    """
    side = min(sample.video.shape[-2:])
    if side < SMALLEST_SIDE:
        raise MetricError(
            f"warping_error needs frames of at least {SMALLEST_SIDE} pixels a side, but got {side}; render larger ones"
        )
    grey_THW = (luma(sample.reference).clamp(0, 1) * 255).round().byte().cpu().numpy()
    video_THWC, reference_THWC = (_channels_last(video) for video in (sample.video, sample.reference))
    excess, count = 0.0, 0
    for t in range(len(grey_THW) - 1):
        flow_HWU, visible_HW = _followed(grey_THW[t], grey_THW[t + 1])
        errors = [
            _error(frames, t, flow_HWU)[visible_HW].sum(dtype=np.float64) for frames in (video_THWC, reference_THWC)
        ]
        excess += errors[0] - errors[1]
        count += int(visible_HW.sum()) * video_THWC.shape[-1]
    return float(excess / count) if count else 0.0


def _channels_last(video_TCHW: Tensor) -> Array:
    frames: Array = video_TCHW.float().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return frames


def _error(frames_THWC: Array, t: int, flow_HWU: Array) -> Array:
    error: Array = np.abs(_follow(frames_THWC[t + 1], flow_HWU) - frames_THWC[t])
    return error


def _followed(grey_HW: Array, next_HW: Array) -> tuple[Array, Array]:
    """Return the flow to the next frame, and which pixels are still to be seen there."""
    flow_HWU, back_HWU = _flow(grey_HW, next_HW), _flow(next_HW, grey_HW)
    returned_HWU = _follow(back_HWU, flow_HWU)
    gap_HW = np.square(flow_HWU + returned_HWU).sum(axis=-1)
    length_HW = np.square(flow_HWU).sum(axis=-1) + np.square(returned_HWU).sum(axis=-1)
    height, width = grey_HW.shape
    to_HWU = _grid(height, width) + flow_HWU
    inside_HW = ((to_HWU >= 0) & (to_HWU <= (width - 1, height - 1))).all(axis=-1)
    return flow_HWU, (gap_HW < 0.01 * length_HW + 0.5) & inside_HW


def _flow(grey_HW: Array, next_HW: Array) -> Array:
    import cv2

    flow: Array = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(grey_HW, next_HW, None)
    return flow


def _follow(values_HWC: Array, flow_HWU: Array) -> Array:
    """Return what stands where each pixel goes, bilinear; beyond the border the border's value."""
    import cv2

    to_HWU = (_grid(*values_HWC.shape[:2]) + flow_HWU).astype(np.float32)
    found: Array = cv2.remap(values_HWC, to_HWU, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return found


def _grid(height: int, width: int) -> Array:
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)


WARPING_ERROR = MetricSpec(
    name="warping_error",
    direction="minimize",
    unit="intensity",
    range=(-1.0, 1.0),
    needs=("video", "reference"),
    looks_at="what changes between frames once the float video's motion is taken out",
    blind_to="Whatever stays the same from frame to frame, blur above all, and pixels that nothing follows.",
    cost="low",
    function=warping_error,
    smallest_side=SMALLEST_SIDE,
    of_itself=0.0,
)
