"""Flicker and warping error on motions that are known exactly."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from metrics.base import Sample
from metrics.flicker import FLOOR, flicker, flicker_energy
from metrics.warping_error import _followed, warping_error

SPEED = 3  # pixels a frame, to the left


def blinking(amplitude: float, frames: int = 5) -> torch.Tensor:
    return (0.5 + amplitude * (torch.arange(frames) % 2))[:, None, None, None].expand(frames, 3, 4, 4)


def pan(frames: int = 5, side: int = 64, seed: int = 0) -> torch.Tensor:
    """[frames, 3, side, side] smooth texture under a camera that moves SPEED pixels a frame to the right."""
    wide = np.random.default_rng(seed).random((3, side, side + SPEED * frames))
    wide = gaussian_filter(wide, (0, 3, 3))
    wide = (wide - wide.min()) / (wide.max() - wide.min())
    return torch.stack([torch.from_numpy(wide[:, :, SPEED * t : SPEED * t + side]) for t in range(frames)]).float()


def shift_error(video: torch.Tensor) -> float:
    """Mean absolute difference along the true motion of `pan`, without what leaves the frame."""
    frames = video.double().numpy()
    return float(np.mean(np.abs(frames[1:, :, :, :-SPEED] - frames[:-1, :, :, SPEED:])))


def test_flicker_energy_equals_a_loop_over_three_frames(draw_video):
    video = draw_video()
    frames = video.double().numpy()
    expected = np.mean([np.abs(frames[t + 1] - 2 * frames[t] + frames[t - 1]) for t in range(1, len(frames) - 1)])

    assert flicker_energy(video) == pytest.approx(expected, rel=1e-5)
    assert flicker_energy(video[:2]) == 0.0


@pytest.mark.parametrize(
    ("amplitude", "reference_amplitude", "doublings"),
    [(0.2, 0.1, 1.0), (0.1, 0.2, 1.0), (0.1, 0.1, 0.0), (0.4, 0.1, 2.0), (2 * FLOOR, 0.0, 2.0), (0.0, 0.0, 0.0)],
)
def test_flicker_counts_doublings_on_both_sides(amplitude, reference_amplitude, doublings, embedder):
    """A blinking pixel's second difference is twice its amplitude, and less than FLOOR counts as FLOOR."""
    sample = Sample("", blinking(amplitude), blinking(reference_amplitude))

    assert flicker(sample, embedder) == pytest.approx(doublings, abs=1e-4)


def test_rounding_to_eight_bits_is_not_flicker(embedder):
    still = pan(frames=1).expand(9, -1, -1, -1)
    dither = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    rounded = ((255 * still + dither).round() / 255).clamp(0, 1)

    assert 0.4 * FLOOR < flicker_energy(rounded) < FLOOR
    assert flicker(Sample("", rounded, still), embedder) == 0.0


def test_an_even_fade_does_not_flicker(embedder):
    fade = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 3, 4, 4)
    still = torch.full_like(fade, 0.5)

    assert flicker(Sample("", fade, still), embedder) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_warping_error_is_the_error_along_the_true_motion(seed, embedder):
    reference = pan(seed=seed)
    noise = 0.1 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed))
    video = reference + noise

    # bilinear reading between pixels averages a part of the noise away, by at most a third of its variance a direction
    assert shift_error(reference) < 1e-6
    assert warping_error(Sample("", video, reference), embedder) == pytest.approx(shift_error(video), rel=0.25)


def test_warping_error_of_flicker_is_its_height(embedder):
    reference = pan()
    video = reference + 0.1 * (torch.arange(5) % 2)[:, None, None, None]

    assert warping_error(Sample("", video, reference), embedder) == pytest.approx(0.1, abs=0.01)


def test_texture_that_stays_while_things_should_move_is_an_error(embedder):
    reference = pan()
    frozen = reference[:1].expand_as(reference)

    assert warping_error(Sample("", frozen, reference), embedder) == pytest.approx(shift_error(frozen), rel=0.1)


def test_pixels_that_are_covered_or_leave_the_frame_are_not_counted():
    """A textured square moves 4 pixels to the right over a still ground; the camera does not move."""
    ground, thing = pan(frames=1, side=96, seed=1)[0, 0].numpy(), pan(frames=1, side=40, seed=2)[0, 0].numpy()
    first, second = (255 * 0.5 * ground for _ in range(2))
    first[28:68, 16:56] = 255 * (0.5 + 0.5 * thing)
    second[28:68, 20:60] = 255 * (0.5 + 0.5 * thing)

    flow, visible = _followed(first.astype(np.uint8), second.astype(np.uint8))
    panned = (255 * pan(frames=2)[:, 0].numpy()).astype(np.uint8)

    assert np.median(flow[32:64, 24:48, 0]) == pytest.approx(4.0, abs=0.1)
    assert visible[32:64, 20:52].all()
    assert not visible[32:64, 56:60].any()
    assert not _followed(*panned)[1][:, :SPEED].any()


@pytest.mark.parametrize("frames", [1, 2])
def test_short_videos_have_a_value(frames, embedder):
    video = pan(frames=frames)

    assert warping_error(Sample("", video, video.clone()), embedder) == 0.0
    assert flicker(Sample("", video, video.clone()), embedder) == 0.0
