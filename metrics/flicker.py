"""Does brightness jump back and forth? Second differences in time, beside those of the float video.

A second difference, x(t + 1) - 2 x(t) + x(t - 1), is zero for whatever changes evenly, so that a fade and slow motion
weigh little and a jump back and forth counts four times its height.
"""

import math

from torch import Tensor

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder

FLOOR = 1 / 255
"""Energy below which a video counts as steady: one 8-bit level. Rounding to 8 bits alone has 0.6 of it."""


def flicker_energy(video_TCHW: Tensor) -> float:
    """Return the mean absolute second difference in time, in [0, 2]; 0 for fewer than three frames."""
    if video_TCHW.shape[0] < 3:
        return 0.0
    return float(video_TCHW.float().diff(n=2, dim=0).abs().mean())


def flicker(sample: Sample, embedder: Embedder) -> float:
    """Return how many times the flicker energy is doubled or halved: |log2(energy / reference energy)|.

    Both sides count: more is flicker, less is motion that froze. An energy below `FLOOR` counts as `FLOOR`.
    """
    energy, reference_energy = (max(flicker_energy(video), FLOOR) for video in (sample.video, sample.reference))
    return abs(math.log2(energy / reference_energy))


FLICKER = MetricSpec(
    name="flicker",
    direction="minimize",
    unit="doublings",
    range=(0.0, math.log2(2.0 / FLOOR)),
    needs=("video", "reference"),
    looks_at="second differences of three successive frames, against the float video's",
    blind_to="Where it flickers, slow drift of brightness, and flicker that has just the energy of the lost motion.",
    cost="low",
    function=flicker,
    of_itself=0.0,
)
