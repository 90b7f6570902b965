"""Is structure kept from fine to coarse? Structural similarity at five scales per frame, averaged over frames.

Source: Wang, Simoncelli and Bovik, Multiscale structural similarity for image quality assessment (2003), eq. 7, with
the exponents of its section 3.2; windows and constants as in `metrics.ssim`.
"""

import torch
from torch import Tensor

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder
from metrics.errors import MetricError

SMALLEST_SIDE = 176  # pixels; the window of 11 must fit into a frame that was halved four times
_CHUNK = 8  # frames at once; bounds memory at 720p


def ms_ssim(sample: Sample, embedder: Embedder) -> float:
    """Return the mean MS-SSIM over frames, in [0, 1]; scales on which frames anticorrelate count as 0.

    Raises:
        MetricError: If a side is below 176 pixels.
    """
    side = min(sample.video.shape[-2:])
    if side < SMALLEST_SIDE:
        raise MetricError(
            f"ms_ssim needs frames of at least {SMALLEST_SIDE} pixels a side, but got {side}; use ssim for smaller ones"
        )
    chunks = zip(torch.split(sample.video.float(), _CHUNK), torch.split(sample.reference.float(), _CHUNK), strict=True)
    return float(torch.cat([_per_frame(video, reference) for video, reference in chunks]).mean())


def _per_frame(video_TCHW: Tensor, reference_TCHW: Tensor) -> Tensor:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure  # takes seconds to import

    per_frame_T: Tensor = multiscale_structural_similarity_index_measure(
        video_TCHW, reference_TCHW, data_range=1.0, reduction="none", normalize="relu"
    )
    return per_frame_T


MS_SSIM = MetricSpec(
    name="ms_ssim",
    direction="maximize",
    unit="ratio",
    range=(0.0, 1.0),
    needs=("video", "reference"),
    looks_at="structural similarity at five scales, full size to a sixteenth",
    blind_to="Colour shifts that keep local contrast, and time between frames; frames below 176 pixels a side.",
    cost="medium",
    function=ms_ssim,
    smallest_side=SMALLEST_SIDE,
    of_itself=1.0,
)
