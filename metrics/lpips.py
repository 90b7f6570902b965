"""Would a viewer tell the frames apart? LPIPS with AlexNet per frame, averaged over frames.

torchmetrics ships the linear heads; AlexNet's weights must lie where torch.hub keeps them.

Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (arXiv:1801.03924), eq. 1.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder
from metrics.errors import MetricError
from metrics.published import require_published, require_tensors, torch_hub_file

ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
SMALLEST_SIDE = 31  # pixels; less is nothing after AlexNet's strides
_CHUNK = 8  # frames at once; bounds memory at 720p


@torch.inference_mode()
def lpips(sample: Sample, embedder: Embedder) -> float:
    """Return the mean LPIPS over frames, at least 0.

    Raises:
        MetricError: If a side is below 31 pixels, or AlexNet's weights are not there or not the published ones.
    """
    side = min(sample.video.shape[-2:])
    if side < SMALLEST_SIDE:
        raise MetricError(
            f"lpips needs frames of at least {SMALLEST_SIDE} pixels a side, but got {side}; render larger frames"
        )
    network = _network(*find_weights())
    chunks = zip(torch.split(sample.video.float(), _CHUNK), torch.split(sample.reference.float(), _CHUNK), strict=True)
    return float(torch.cat([network(video, reference, normalize=True).flatten() for video, reference in chunks]).mean())


def find_weights() -> tuple[Path, ...]:
    """Return the file with AlexNet's weights."""
    return (torch_hub_file("lpips", ALEXNET_URL),)


@lru_cache(maxsize=1)
def _network(weights: Path) -> Callable[..., Tensor]:
    """Build torchmetrics' network, which loads the file from its place and would download one that is not there."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity  # takes seconds to import

    require_published("lpips", weights)
    require_tensors("lpips", weights)
    network: Callable[..., Tensor] = LearnedPerceptualImagePatchSimilarity(net_type="alex").net
    return network


LPIPS = MetricSpec(
    name="lpips",
    direction="minimize",
    unit="distance",
    range=(0.0, float("inf")),
    needs=("video", "reference"),
    looks_at="AlexNet's features of each frame and of the float video's frame",
    blind_to="Time between frames, and whether a different video is also good: it only says how different it is.",
    cost="medium",
    function=lpips,
    smallest_side=SMALLEST_SIDE,
    of_itself=0.0,
    find_weights=find_weights,
)
