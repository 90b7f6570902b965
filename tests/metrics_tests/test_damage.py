"""Which metrics see which damage, on clips that the shipped model renders: the table of docs/evaluation.md."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hyquant import load_model
from hyquant.models.base import RenderSettings
from metrics.base import Sample
from metrics.embedders import load_embedder
from metrics.registry import METRICS
from metrics.score import score_samples
from tests.metrics_tests.good_clips import pan

PROMPTS = ("a red circle moving left on a black background", "a blue square moving up on a white background")

BOUNDS = {
    "clip_prompt": 0.05,  # the default of a study
    "clip_reference": 0.02,
    "psnr_db": 70.0,  # below the cap of 100: at least 30 dB
    "ssim": 0.05,
    "flicker": 1.0,
    "warping_error": 0.02,
    "sharpness_db": 3.0,
    "exposure": 0.02,
    "collapsed": 0.0,
}
"""How far a mean may lie from the float video's before the damage counts as seen; motion has bounds of its own."""
MOTION_BOUNDS = (0.5, 2.0)  # the default of a study


def random(video, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(video.shape, generator=torch.Generator().manual_seed(3))


def grain(video, scale):
    return (video + scale * torch.randn(video.shape, generator=torch.Generator().manual_seed(3))).clamp(0, 1)


def tiled(video, side=16):
    coarse = random(video[:1, :, ::side, ::side], -0.15, 0.15)
    return (video + coarse.repeat_interleave(side, 2).repeat_interleave(side, 3)).clamp(0, 1)


def dimmed_every_second_frame(video):
    return video * (1 - 0.2 * (torch.arange(len(video)) % 2))[:, None, None, None]


def blurred(video):
    return F.avg_pool2d(F.pad(video, (3, 3, 3, 3), mode="replicate"), 7, stride=1)


DAMAGES = {
    "frozen frames": lambda video: video[:1].expand_as(video),
    "last third noise": lambda video: torch.cat((video[:9], random(video)[9:])),
    "blur": blurred,
    "brightness flicker": dimmed_every_second_frame,
    "tile mosaic": tiled,
    "channel noise": lambda video: torch.cat((grain(video[:, :1], 0.2), video[:, 1:]), dim=1),
}

SEEN_BY = {
    "frozen frames": {
        "clip_prompt", "clip_reference", "psnr_db", "ssim", "motion_energy_ratio", "flicker", "collapsed"
    },
    "last third noise": {
        "clip_reference", "psnr_db", "ssim", "motion_energy_ratio", "flicker", "warping_error", "sharpness_db",
        "exposure", "collapsed",
    },
    "blur": {"psnr_db", "ssim", "sharpness_db"},
    "brightness flicker": {"psnr_db", "motion_energy_ratio", "flicker", "warping_error"},
    "tile mosaic": {"psnr_db", "ssim", "collapsed"},
    "channel noise": {"psnr_db", "ssim", "motion_energy_ratio", "flicker", "warping_error", "sharpness_db"},
}  # fmt: skip

NEUTRAL = {
    "nothing": lambda video: video,
    "rounding to 8 bits": lambda video: (video * 255).round() / 255,
    "grain of a quarter of a level": partial(grain, scale=0.001),
}


@pytest.fixture(scope="module")
def references():
    model = load_model("hunyuan_video", "mini")
    settings = RenderSettings(height=64, width=64, num_frames=13, num_steps=20)
    return [video.float() for video in model.render(list(PROMPTS), [1, 2], settings)]


@pytest.fixture(scope="module")
def judge():
    return load_embedder("mini", view="grid")


def seen_by(references, videos, judge):
    """Return the metrics whose mean over the prompts is out of its bounds."""
    names = [*BOUNDS, "motion_energy_ratio"]
    candidates = [Sample(*parts) for parts in zip(PROMPTS, videos, references, strict=True)]
    floats = [Sample(*parts) for parts in zip(PROMPTS, references, references, strict=True)]
    scores, float_scores = (score_samples(samples, names, judge) for samples in (candidates, floats))
    means, float_means = (
        {name: sum(values) / len(values) for name, values in found.items()} for found in (scores, float_scores)
    )
    seen = {name for name, bound in BOUNDS.items() if abs(means[name] - float_means[name]) > bound}
    low, high = MOTION_BOUNDS
    return seen if low <= means["motion_energy_ratio"] <= high else {*seen, "motion_energy_ratio"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_seen_by_the_metrics_that_are_made_for_it(damage, references, judge):
    videos = [DAMAGES[damage](reference) for reference in references]

    assert seen_by(references, videos, judge) == SEEN_BY[damage]


@pytest.mark.parametrize("change", NEUTRAL.values(), ids=NEUTRAL)
def test_neutral_changes_are_seen_by_none(change, references, judge):
    assert seen_by(references, [change(reference) for reference in references], judge) == set()


def test_clip_prompt_is_blind_to_all_but_one_of_them():
    """The one is frozen frames: the prompt names the motion, and the judge sees four frames at once."""
    assert [damage for damage, seers in SEEN_BY.items() if "clip_prompt" in seers] == ["frozen frames"]
    assert all(seers - {"clip_prompt", "clip_reference"} for seers in SEEN_BY.values())


@pytest.mark.parametrize(
    ("damage", "is_seen"),
    [
        ("frozen frames", True),
        ("last third noise", True),
        ("blur", False),
        ("brightness flicker", False),
        ("tile mosaic", True),
        ("channel noise", True),
    ],
)
def test_ms_ssim_sees_what_changes_structure(damage, is_seen, embedder):
    """On a textured pan of 192 pixels a side, as it needs more than 175; blur is finer than the texture there."""
    reference = F.interpolate(pan(torch.Generator().manual_seed(1)), (192, 192), mode="bilinear")
    video = DAMAGES[damage](reference)

    value = METRICS["ms_ssim"].function(Sample("", video, reference), embedder)

    assert (value < 0.95) == is_seen
