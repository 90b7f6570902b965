"""Damage done to clips, scored by the shipped metrics and judged: which metric sees it, and that it never passes."""

import pytest
import torch

from metrics.base import Sample
from metrics.hashing import HashingEmbedder
from metrics.registry import find_metric
from metrics.score import score_samples
from metrics.statistics.verdict import combined
from search.margin_verdicts import PairedScores, margin_verdicts
from search.margins import DEFAULT_MARGINS, Margin

MARGINS = (*DEFAULT_MARGINS, Margin(metric="psnr_db", min=30))
NUM_PROMPTS = 32
FRAMES, SIDE = 9, 32


def clip(index):
    """A square of some colour and speed, with a little grain, that moves to the right."""
    generator = torch.Generator().manual_seed(index)
    video = 0.2 + 0.02 * torch.rand(FRAMES, 3, SIDE, SIDE, generator=generator)
    colour, speed = 0.3 + 0.7 * torch.rand(3, generator=generator), 1 + index % 3
    for frame in range(FRAMES):
        left = speed * frame
        video[frame, :, 8:16, left : left + 8] = colour[:, None, None]
    return video


def noise_like(video, index):
    return torch.rand(video.shape, generator=torch.Generator().manual_seed(1000 + index))


def with_noisy_end(video, index):
    return torch.cat((video[:6], noise_like(video, index)[6:]))


DAMAGE = {
    "frozen": (lambda video, index: video[:1].expand_as(video), {"motion_energy_ratio", "collapsed", "psnr_db"}),
    "last third noise": (with_noisy_end, {"motion_energy_ratio", "psnr_db"}),
    "black": (lambda video, index: torch.zeros_like(video), {"collapsed", "psnr_db"}),
    "not finite": (lambda video, index: video * float("nan"), {"collapsed", "clip_reference", "psnr_db"}),
    "flickering": (
        lambda video, index: video * (1 - 0.3 * (torch.arange(FRAMES) % 2))[:, None, None, None],
        {"motion_energy_ratio", "psnr_db"},
    ),
}


def verdicts(damage):
    """Return the verdict per metric over 32 prompts whose clips were damaged."""
    floats = [clip(index) for index in range(NUM_PROMPTS)]
    samples = [Sample(f"prompt {i}", damage(video, i), video) for i, video in enumerate(floats)]
    selves = [Sample(f"prompt {i}", video, video) for i, video in enumerate(floats)]
    names = [margin.metric for margin in MARGINS]
    values, own = (score_samples(given, names, HashingEmbedder()) for given in (samples, selves))
    paired = [
        PairedScores(find_metric(margin.metric), margin, tuple(values[margin.metric]), tuple(own[margin.metric]))
        for margin in MARGINS
    ]
    return {found.metric: found.verdict for found in margin_verdicts(paired, range(NUM_PROMPTS), alpha=0.05)}


def test_identical_clips_are_certified_by_the_default_margins():
    assert set(verdicts(lambda video, index: video.clone()).values()) == {"PASS"}


def test_what_rounding_to_8_bits_costs_is_certified():
    assert combined(verdicts(lambda video, index: (video * 255).round() / 255).values()) == "PASS"


@pytest.mark.parametrize(("damage", "witnesses"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_clips_fail_and_the_metrics_that_must_see_it_do(damage, witnesses):
    found = verdicts(damage)

    assert combined(found.values()) == "FAIL"
    assert witnesses <= {metric for metric, verdict in found.items() if verdict == "FAIL"}


def test_damage_to_a_third_of_the_prompts_is_not_certified():
    """The mean is what is judged, so a few bad prompts must be enough to move it or to open the question."""
    found = verdicts(lambda video, index: with_noisy_end(video, index) if index % 3 == 0 else video.clone())

    assert combined(found.values()) != "PASS"
