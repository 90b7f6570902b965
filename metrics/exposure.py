"""Are the tones well placed? Well-exposedness: how near the colours of a pixel are to the middle; reads no reference.

A prompt may ask for night or snow, so the value means little alone: `exposure_drop` compares with the float video.

Source: Mertens, Kautz and Van Reeth, Exposure Fusion (2007), section 3.1, with its sigma of 0.2.
"""

import math

import torch

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder

_SIGMA = 0.2
_CHUNK = 8  # frames at once; bounds memory at 720p


def exposure(sample: Sample, embedder: Embedder) -> float:
    """Return the mean over pixels of exp(-sum over colours of (value - 0.5)^2 / (2 sigma^2)), in (0, 1]."""
    frames = torch.split(sample.video.float(), _CHUNK)
    sums = [float((-(chunk - 0.5).square().sum(dim=1) / (2 * _SIGMA**2)).exp().sum()) for chunk in frames]
    return sum(sums) / sample.video[:, 0].numel()


EXPOSURE = MetricSpec(
    name="exposure",
    direction="maximize",
    unit="ratio",
    range=(math.exp(-3 * 0.25 / (2 * _SIGMA**2)), 1.0),
    needs=("video",),
    looks_at="distance of every colour of every pixel from the middle of its range",
    blind_to="Structure, motion and meaning: an even grey frame is perfect, and haze looks like an improvement.",
    cost="low",
    function=exposure,
)
