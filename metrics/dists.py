"""Are structure and texture kept? DISTS with VGG-16 per frame, averaged over frames.

Unlike LPIPS it forgives texture that is another sample of the same kind. torchmetrics ships the weights of the terms;
VGG-16's must lie where torch.hub keeps them.

Source: Ding et al., Image Quality Assessment: Unifying Structure and Texture Similarity (arXiv:2004.07728), eq. 6.
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

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
SMALLEST_SIDE = 16  # pixels; a sixteenth of a side is the coarsest stage
_CHUNK = 2  # frames at once; bounds memory at 720p


@torch.inference_mode()
def dists(sample: Sample, embedder: Embedder) -> float:
    """Return the mean DISTS over frames, 0 for equal frames.

    Raises:
        MetricError: If a side is below 16 pixels, or VGG-16's weights are not there or not the published ones.
    """
    side = min(sample.video.shape[-2:])
    if side < SMALLEST_SIDE:
        raise MetricError(
            f"dists needs frames of at least {SMALLEST_SIDE} pixels a side, but got {side}; render larger frames"
        )
    network = _network(*find_weights())
    chunks = zip(torch.split(sample.video.float(), _CHUNK), torch.split(sample.reference.float(), _CHUNK), strict=True)
    per_frame_T = torch.cat([network(video, reference).reshape(-1) for video, reference in chunks])
    return float(per_frame_T.clamp(min=0.0).mean())  # equal frames are 1e-7 below 0


def find_weights() -> tuple[Path, ...]:
    """Return the file with VGG-16's weights."""
    return (torch_hub_file("dists", VGG_URL),)


@lru_cache(maxsize=1)
def _network(weights: Path) -> Callable[..., Tensor]:
    """Build torchmetrics' network, which loads the file from its place and would download one that is not there.

    Its metric class builds the network anew for every batch, so the network itself is kept.
    """
    from torchmetrics.functional.image.dists import DISTSNetwork  # takes seconds to import

    require_published("dists", weights)
    require_tensors("dists", weights)
    network: Callable[..., Tensor] = DISTSNetwork().eval()
    return network


DISTS = MetricSpec(
    name="dists",
    direction="minimize",
    unit="distance",
    range=(0.0, 2.0),
    needs=("video", "reference"),
    looks_at="means and covariances of VGG-16's feature maps of each frame and of the float video's frame",
    blind_to="Time between frames, where in a frame something is, and a texture swapped for another sample of it.",
    cost="high",
    function=dists,
    smallest_side=SMALLEST_SIDE,
    of_itself=0.0,
    find_weights=find_weights,
)
