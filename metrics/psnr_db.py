"""How large is the pixel error? Peak signal-to-noise ratio of the whole video, capped so that means stay finite."""

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder

CAP_DB = 100.0
"""Value of identical videos, whose ratio is infinite: the one of an error of 1e-5, far below an 8-bit level (48 dB)."""


def psnr_db(sample: Sample, embedder: Embedder) -> float:
    """Return 10 log10(1 / mean squared error) over all frames and pixels, at most `CAP_DB`."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # takes seconds to import

    value = peak_signal_noise_ratio(sample.video.float(), sample.reference.float(), data_range=1.0)
    return float(value.clamp(max=CAP_DB))


PSNR_DB = MetricSpec(
    name="psnr_db",
    direction="maximize",
    unit="dB",
    range=(0.0, CAP_DB),
    needs=("video", "reference"),
    looks_at="squared error of pixels",
    blind_to="Whether an error is visible: a shift by one pixel costs more than a smeared texture.",
    cost="low",
    function=psnr_db,
    of_itself=CAP_DB,
)
