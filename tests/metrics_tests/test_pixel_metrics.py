import math

import numpy as np
import pytest
import torch

from metrics.base import Sample
from metrics.errors import MetricError
from metrics.psnr_db import CAP_DB, psnr_db
from metrics.ssim import ssim


def random_pair(frames: int, side: int, *, seed: int, noise: float) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.rand(frames, 3, side, side, generator=generator)
    video = (reference + noise * torch.randn(reference.shape, generator=generator)).clamp(0, 1)
    return Sample("", video, reference)


def loop_ssim(x: np.ndarray, y: np.ndarray, radius: int, sigma: float) -> float:
    """Equation 13 of Wang et al. (2004), pixel by pixel, for one colour plane in [0, 1]."""
    offsets = np.arange(-radius, radius + 1)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * sigma**2))
    window /= window.sum()
    x_padded, y_padded = (np.pad(plane, radius, mode="reflect") for plane in (x, y))
    size = 2 * radius + 1
    values = []
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            a = x_padded[row : row + size, column : column + size]
            b = y_padded[row : row + size, column : column + size]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
            covariance = (window * a * b).sum() - mean_a * mean_b
            luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
            structure = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
            values.append(luminance * structure)
    return float(np.mean(values))


def test_psnr_is_the_one_of_numpy_over_the_whole_video(embedder):
    sample = random_pair(3, 16, seed=1, noise=0.1)
    error = sample.video.double().numpy() - sample.reference.double().numpy()
    expected = 10 * math.log10(1 / np.mean(error**2))

    assert psnr_db(sample, embedder) == pytest.approx(expected, abs=1e-4)  # float32 sums


def test_a_uniform_error_of_one_tenth_is_twenty_decibels(embedder):
    reference = torch.full((2, 3, 8, 8), 0.5)

    assert psnr_db(Sample("", reference + 0.1, reference), embedder) == pytest.approx(20.0, abs=1e-4)


def test_identical_videos_have_the_documented_cap(draw_video, embedder):
    video = draw_video()

    assert psnr_db(Sample("", video, video.clone()), embedder) == CAP_DB == 100.0


def test_ssim_equals_a_loop_over_every_pixel(embedder):
    sample = random_pair(2, 14, seed=2, noise=0.2)
    planes = zip(sample.video.flatten(0, 1).double(), sample.reference.flatten(0, 1).double(), strict=True)
    expected = np.mean([loop_ssim(x.numpy(), y.numpy(), radius=5, sigma=1.5) for x, y in planes])

    assert ssim(sample, embedder) == pytest.approx(expected, abs=1e-4)  # float32 variances by subtraction


@pytest.mark.parametrize(("side", "radius"), [(10, 4), (8, 3), (5, 2), (3, 1)])
def test_small_frames_get_a_window_that_fits(side, radius, embedder):
    sample = random_pair(1, side, seed=3, noise=0.2)
    planes = zip(sample.video[0].double(), sample.reference[0].double(), strict=True)
    expected = np.mean([loop_ssim(x.numpy(), y.numpy(), radius, sigma=0.3 * radius) for x, y in planes])

    assert ssim(sample, embedder) == pytest.approx(expected, abs=1e-4)


def test_ssim_of_many_frames_is_the_mean_of_single_frames(embedder):
    """More frames than are processed at once."""
    sample = random_pair(19, 16, seed=4, noise=0.1)
    single = [ssim(Sample("", v[None], r[None]), embedder) for v, r in zip(sample.video, sample.reference, strict=True)]

    assert ssim(sample, embedder) == pytest.approx(np.mean(single), abs=1e-6)


def test_ssim_of_identical_videos_is_one(draw_video, embedder):
    video = draw_video()

    assert ssim(Sample("", video, video.clone()), embedder) == pytest.approx(1.0, abs=1e-6)


def test_frames_too_small_for_any_window_are_refused(embedder):
    with pytest.raises(MetricError, match="at least 3 pixels a side, but got 2"):
        ssim(random_pair(1, 2, seed=5, noise=0.1), embedder)
