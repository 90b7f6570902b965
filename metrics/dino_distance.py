"""Does every frame show the same thing in the same look? Cosine distance of DINOv2 embeddings: the importer of timm.

DINO is trained on pictures without captions, so that it keeps the look of a subject where CLIP keeps its name. The
weights must lie in the Hugging Face cache.

Source: Oquab et al., DINOv2 (arXiv:2304.07193); the distance of frames as in VBench (arXiv:2311.17982), section 3.1.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder
from metrics.published import hugging_face_file, require_published

MODEL = "vit_small_patch14_dinov2.lvd142m"
WEIGHTS_FILE = "model.safetensors"
SIDE = 224  # pixels, a multiple of the model's patch of 14
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the model was trained
_CHUNK = 16  # frames at once


def dino_distance(sample: Sample, embedder: Embedder) -> float:
    """Return 1 less the mean over frames of the cosine between a frame and the reference's frame, in [0, 2].

    Frames are resized to 224 x 224 pixels, whatever their shape, so that nothing is cropped away.

    Raises:
        WeightsMissing: If the model's weights are not there.
    """
    network = _network(*find_weights())
    video_TE, reference_TE = (_embed(network, video) for video in (sample.video, sample.reference))
    return float((1.0 - F.cosine_similarity(video_TE, reference_TE)).clamp(min=0.0).mean())


def find_weights() -> tuple[Path, ...]:
    """Return the file with DINOv2's weights."""
    return (hugging_face_file("dino_distance", f"timm/{MODEL}", WEIGHTS_FILE),)


@torch.inference_mode()
def _embed(network: Callable[[Tensor], Tensor], video_TCHW: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    frames = F.interpolate(video_TCHW.float().cpu(), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    return torch.cat([network((chunk - mean) / std) for chunk in torch.split(frames, _CHUNK)])


@lru_cache(maxsize=1)
def _network(weights: Path) -> Callable[[Tensor], Tensor]:
    """Build the model from the file; `file` keeps timm from asking a server."""
    import timm

    require_published("dino_distance", weights)
    network: Callable[[Tensor], Tensor] = timm.create_model(
        MODEL, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, num_classes=0, img_size=SIDE
    ).eval()
    return network


DINO_DISTANCE = MetricSpec(
    name="dino_distance",
    direction="minimize",
    unit="cosine distance",
    range=(0.0, 2.0),
    needs=("video", "reference"),
    looks_at="DINOv2 embeddings of each frame and of the float video's frame",
    blind_to="Time between frames, grain lost in resizing to 224 pixels, and whether a different video is also good.",
    cost="low",
    function=dino_distance,
    of_itself=0.0,
    find_weights=find_weights,
)
