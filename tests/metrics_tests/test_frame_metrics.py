"""MS-SSIM, sharpness, exposure and luma against scipy, numpy and hand-worked values."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, laplace

from metrics.base import Sample
from metrics.exposure import exposure
from metrics.luma import luma
from metrics.ms_ssim import ms_ssim
from metrics.sharpness_db import FLOOR_DB, sharpness_db


def uniform(value: float, frames: int = 2, side: int = 8) -> torch.Tensor:
    return torch.full((frames, 3, side, side), value)


def random_video(seed: int, frames: int = 2, side: int = 24) -> torch.Tensor:
    return torch.rand(frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


def alone(video: torch.Tensor) -> Sample:
    return Sample("", video, torch.zeros_like(video))


def likeness(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Mean SSIM and mean contrast-structure term of two planes, where the window of 11 x 11 fits."""

    def blur(plane):
        return gaussian_filter(plane, 1.5, truncate=3.5, mode="mirror")

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    structure = (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2)
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    return (luminance * structure).mean(), structure.mean()


def halved(plane: np.ndarray) -> np.ndarray:
    return plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2).mean(axis=(1, 3))


def test_ms_ssim_is_the_product_of_five_scales(embedder):
    """Equation 7 of Wang et al. (2003): contrast and structure at every scale, luminance at the coarsest."""
    x = random_video(1, frames=1, side=176)
    y = (x + 0.5 * random_video(2, frames=1, side=176)).clamp(0, 1)
    colours = [(a.double().numpy(), b.double().numpy()) for a, b in zip(x[0], y[0], strict=True)]
    expected = 1.0
    for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        terms = [likeness(a, b)[0 if scale == 4 else 1] for a, b in colours]
        expected *= np.mean(terms) ** exponent
        colours = [(halved(a), halved(b)) for a, b in colours] if scale < 4 else colours

    assert ms_ssim(Sample("", x, y), embedder) == pytest.approx(expected, abs=2e-4)  # float32 variances by subtraction


def test_ms_ssim_of_many_frames_is_the_mean_of_single_frames(embedder):
    x, y = random_video(3, frames=9, side=176), random_video(4, frames=9, side=176)
    single = [ms_ssim(Sample("", a[None], b[None]), embedder) for a, b in zip(x, y, strict=True)]

    assert ms_ssim(Sample("", x, y), embedder) == pytest.approx(np.mean(single), abs=1e-6)


def test_sharpness_is_the_variance_of_scipys_laplacian(embedder):
    video = random_video(5)
    variances = [np.var(laplace(frame)[1:-1, 1:-1]) for frame in luma(video).double().numpy()]

    assert sharpness_db(alone(video), embedder) == pytest.approx(10 * math.log10(np.mean(variances)), abs=1e-4)


def test_half_the_contrast_is_six_decibels_less_sharp(embedder):
    video = random_video(6)

    loss = sharpness_db(alone(video), embedder) - sharpness_db(alone(0.25 + 0.5 * video), embedder)

    assert loss == pytest.approx(20 * math.log10(2), abs=1e-3)


def test_rounding_to_eight_bits_alone_is_the_floor_of_sharpness(embedder):
    """An even ramp has no Laplacian; rounding it at random leaves white noise of a twelfth of a squared level."""
    rows = torch.arange(256)
    ramp = (0.3 + 0.0013 * rows[:, None] + 0.0017 * rows).expand(2, 3, 256, 256)
    dither = torch.rand((2, 1, 256, 256), generator=torch.Generator().manual_seed(0)) - 0.5
    rounded = ramp + dither.expand_as(ramp) / 255

    assert sharpness_db(alone(uniform(0.5)), embedder) == FLOOR_DB
    assert sharpness_db(alone(rounded), embedder) == pytest.approx(FLOOR_DB, abs=0.1)  # 1 % of the variance


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.5, 1.0), (0.3, math.exp(-1.5)), (0.7, math.exp(-1.5)), (0.0, math.exp(-9.375)), (1.0, math.exp(-9.375))],
)
def test_exposure_of_even_grey(value, expected, embedder):
    """Three colours, each (0.2 / 0.2)^2 / 2 = 0.5 from the middle at 0.3, and 3.125 at 0."""
    assert exposure(alone(uniform(value)), embedder) == pytest.approx(expected, rel=1e-5)


def test_exposure_of_many_frames_equals_numpy(embedder):
    video = random_video(7, frames=19)
    weights = np.exp(-((video.double().numpy() - 0.5) ** 2) / (2 * 0.2**2)).prod(axis=1)

    assert exposure(alone(video), embedder) == pytest.approx(weights.mean(), rel=1e-5)


def test_luma_of_pure_colours():
    colours = torch.eye(3)[:, :, None, None]

    assert luma(colours).flatten().tolist() == pytest.approx([0.2126, 0.7152, 0.0722])
    assert luma(uniform(1.0)).unique().tolist() == pytest.approx([1.0])
