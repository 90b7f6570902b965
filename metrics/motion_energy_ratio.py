"""Does the video move as much as the float video? Ratio of the mean absolute differences of successive frames.

Read it from both sides: below 1 motion froze, above 1 there is flicker or noise that the reference does not have.
"""

from torch import Tensor

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder

STILL = 0.5 / 255
"""Motion energy below which a video counts as still: half of one 8-bit level per pixel and frame."""


def motion_energy(video_TCHW: Tensor) -> float:
    """Return the mean absolute difference of successive frames, in [0, 1]; 0 for a single frame."""
    if video_TCHW.shape[0] < 2:
        return 0.0
    return float(video_TCHW.float().diff(dim=0).abs().mean())


def motion_energy_ratio(sample: Sample, embedder: Embedder) -> float:
    """Return the video's motion energy over the reference's.

    1 where both are below `STILL`, because a ratio of two roundings says nothing; a still reference counts as `STILL`.
    """
    energy, reference_energy = motion_energy(sample.video), motion_energy(sample.reference)
    if energy < STILL and reference_energy < STILL:
        return 1.0
    return energy / max(reference_energy, STILL)


MOTION_ENERGY_RATIO = MetricSpec(
    name="motion_energy_ratio",
    direction="maximize",
    unit="ratio",
    range=(0.0, float("inf")),
    needs=("video", "reference"),
    looks_at="differences of successive frames",
    blind_to="What moves, where and in which direction; flicker that has just the energy of the lost motion.",
    cost="low",
    function=motion_energy_ratio,
    of_itself=1.0,
)
