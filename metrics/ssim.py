"""Is local structure kept? Structural similarity per frame, averaged over frames.

Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity (2004), eq. 13, with a
Gaussian window of 11 x 11, sigma 1.5, k1 = 0.01 and k2 = 0.03; frames are reflected at their borders.
"""

import torch
from torch import Tensor

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder
from metrics.errors import MetricError

SMALLEST_SIDE = 3  # pixels; a window needs a neighbour on either side
_RADIUS = 5  # pixels from the centre of the published window to its border
_SIGMA = 1.5  # pixels
_CHUNK = 8  # frames at once; bounds memory at 720p


def ssim(sample: Sample, embedder: Embedder) -> float:
    """Return the mean SSIM over frames, in [-1, 1].

    Frames with a side below 11 pixels get a smaller window of the same form.

    Raises:
        MetricError: If a side is below 3 pixels.
    """
    sigma = _window_sigma(min(sample.video.shape[-2:]))
    chunks = zip(torch.split(sample.video.float(), _CHUNK), torch.split(sample.reference.float(), _CHUNK), strict=True)
    return float(torch.cat([_ssim_per_frame(video, reference, sigma) for video, reference in chunks]).mean())


def _window_sigma(side: int) -> float:
    if side < SMALLEST_SIDE:
        raise MetricError(
            f"ssim needs frames of at least {SMALLEST_SIDE} pixels a side, but got {side}; render larger frames"
        )
    radius = min(_RADIUS, (side - 1) // 2)
    return _SIGMA * radius / _RADIUS


def _ssim_per_frame(video_TCHW: Tensor, reference_TCHW: Tensor, sigma: float) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds to import

    per_frame_T = structural_similarity_index_measure(
        video_TCHW, reference_TCHW, sigma=sigma, data_range=1.0, reduction="none"
    )
    assert isinstance(per_frame_T, Tensor)  # a pair only if the full image is asked for
    return per_frame_T


SSIM = MetricSpec(
    name="ssim",
    direction="maximize",
    unit="ratio",
    range=(-1.0, 1.0),
    needs=("video", "reference"),
    looks_at="means, variances and covariances in windows of 11 x 11 pixels",
    blind_to="Colour shifts that keep local contrast, time between frames, and whether a different video is also good.",
    cost="medium",
    function=ssim,
    smallest_side=SMALLEST_SIDE,
    of_itself=1.0,
)
