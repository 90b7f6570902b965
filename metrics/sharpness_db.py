"""How much fine detail is there? Variance of the Laplacian of luma, in dB; reads no reference.

`sharpness_db_drop` is how many dB the video lost against the float one: 6 dB is half the amplitude.

Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy (2000), section 3 (VOL).
"""

import math

import torch
import torch.nn.functional as F

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder
from metrics.luma import luma

FLOOR_DB = 10 * math.log10(20 / 12 / 255**2)
"""What rounding to 8 bits alone has: 1/12 of a squared level, times the sum of squared taps (4 x 1 + 16)."""
CEILING_DB = 10 * math.log10(16.0)
"""The Laplacian of values in [0, 1] lies in [-4, 4]."""


def sharpness_db(sample: Sample, embedder: Embedder) -> float:
    """Return 10 log10 of the mean over frames of the variance of the Laplacian of luma, in dB, at least `FLOOR_DB`.

    `FLOOR_DB` also for frames below 3 pixels a side, which have no Laplacian.
    """
    if min(sample.video.shape[-2:]) < 3:
        return FLOOR_DB
    taps = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=sample.video.device)
    laplacian_T1HW = F.conv2d(luma(sample.video)[:, None], taps[None, None])
    variance = float(laplacian_T1HW.flatten(1).var(dim=1, correction=0).mean())
    return max(10 * math.log10(variance), FLOOR_DB) if variance > 0 else FLOOR_DB


SHARPNESS_DB = MetricSpec(
    name="sharpness_db",
    direction="maximize",
    unit="dB",
    range=(FLOOR_DB, CEILING_DB),
    needs=("video",),
    looks_at="variance of the Laplacian of luma in each frame",
    blind_to="Whether the detail is texture or noise: grain and blocks count as sharp; motion, colour and meaning.",
    cost="low",
    function=sharpness_db,
)
