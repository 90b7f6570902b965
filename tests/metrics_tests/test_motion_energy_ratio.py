from itertools import pairwise

import numpy as np
import pytest
import torch

from metrics.base import Sample
from metrics.motion_energy_ratio import STILL, motion_energy, motion_energy_ratio


def blinking(amplitude: float, frames: int = 4) -> torch.Tensor:
    """Every pixel changes by `amplitude` from frame to frame."""
    return (0.5 + amplitude * (torch.arange(frames) % 2))[:, None, None, None].expand(frames, 3, 4, 4)


def test_motion_energy_equals_a_loop_over_pairs_of_frames(draw_video):
    video = draw_video()
    frames = video.double().numpy()
    expected = np.mean([np.abs(after - before).mean() for before, after in pairwise(frames)])

    assert motion_energy(video) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("amplitude", "reference_amplitude", "ratio"),
    [(0.2, 0.1, 2.0), (0.1, 0.1, 1.0), (0.0, 0.1, 0.0), (0.05, 0.1, 0.5)],
)
def test_ratio_of_known_energies(amplitude, reference_amplitude, ratio, embedder):
    sample = Sample("", blinking(amplitude), blinking(reference_amplitude))

    assert motion_energy_ratio(sample, embedder) == pytest.approx(ratio, rel=1e-5)


def test_two_still_videos_count_as_equally_still(embedder):
    """Their energies differ by a factor of ten, but both are less than a rounding to 8 bits."""
    sample = Sample("", blinking(0.9 * STILL), blinking(0.09 * STILL))

    assert motion_energy_ratio(sample, embedder) == 1.0


def test_flicker_over_a_still_reference_is_large_and_finite(embedder):
    sample = Sample("", blinking(10 * STILL), blinking(0.0))

    assert motion_energy_ratio(sample, embedder) == pytest.approx(10.0, rel=1e-4)


def test_a_single_frame_does_not_move(embedder):
    frame = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    assert motion_energy(frame) == 0.0
    assert motion_energy_ratio(Sample("", frame, frame), embedder) == 1.0
