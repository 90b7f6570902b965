"""Every detector fires on the damage it is named after and keeps quiet on good and on mildly damaged videos."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from metrics.base import Sample
from metrics.collapsed import DETECTORS, collapse_reason, collapsed, describe_collapses, fine_energy
from tests.metrics_tests.good_clips import good_clip

COLOURS = [(0.9, 0.2, 0.1), (0.1, 0.2, 0.95), (0.95, 0.9, 0.1)]


def noise_like(video, scale, seed=0):
    return scale * torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))


def uniform_blocks(video, block):
    frames, colours, height, width = video.shape
    small = torch.rand(frames, colours, height // block, width // block, generator=torch.Generator().manual_seed(block))
    return small.repeat_interleave(block, -1).repeat_interleave(block, -2)


def in_blocks(video, block):
    return F.avg_pool2d(video, block).repeat_interleave(block, -1).repeat_interleave(block, -2)


def with_one_pixel(video, value):
    damaged = video.clone()
    damaged[-1, 0, 3, 3] = value
    return damaged


DAMAGE = {
    "nan": (lambda video: with_one_pixel(video, float("nan")), "not finite"),
    "infinite": (lambda video: with_one_pixel(video, float("inf")), "not finite"),
    "one frame less": (lambda video: video[:-1], "wrong frame count"),
    "one frame more": (lambda video: torch.cat((video, video[-1:])), "wrong frame count"),
    "black": (torch.zeros_like, "black"),
    "grey": (lambda video: torch.full_like(video, 0.5), "flat"),
    "grey with faint grain": (lambda video: 0.5 + noise_like(video, 0.01), "flat"),
    "last third black": (lambda video: torch.cat((video[:6], torch.zeros_like(video[6:]))), "black"),
    "frozen": (lambda video: video[:1].expand_as(video), "frozen"),
    "last third frozen": (lambda video: torch.cat((video[:6], video[5:6].expand_as(video[6:]))), "frozen"),
    "almost frozen": (lambda video: video[:1] + noise_like(video, 1e-4), "frozen"),
    "uniform noise": (lambda video: uniform_blocks(video, 1), "noise"),
    "strong grain": (lambda video: (video + noise_like(video, 0.3)).clamp(0, 1), "noise"),
    "noise of 4 pixels": (lambda video: uniform_blocks(video, 4).roll((2, 2), dims=(2, 3)), "noise"),
    "mosaic of 2 pixels": (lambda video: uniform_blocks(video, 2), "tile mosaic"),
    "last third noise": (lambda video: torch.cat((video[:6], uniform_blocks(video, 1)[6:])), "noise"),
    "mosaic of 4 pixels": (lambda video: uniform_blocks(video, 4), "tile mosaic"),
    "mosaic of 8 pixels": (lambda video: uniform_blocks(video, 8), "tile mosaic"),
    "tiles of other brightness": (
        lambda video: (video + 0.3 * (uniform_blocks(video, 8) - 0.5)).clamp(0, 1),
        "tile mosaic",
    ),
}

MILD = {
    "nothing": lambda video: video.clone(),
    "rounding to 8 bits": lambda video: (video * 255).round() / 255,
    "light grain": lambda video: (video + noise_like(video, 0.03)).clamp(0, 1),
    "blur": lambda video: F.avg_pool2d(video, 3, stride=1, padding=1),
    "half the contrast": lambda video: 0.25 + 0.5 * video,
    "brighter": lambda video: (video + 0.1).clamp(0, 1),
    "shifted": lambda video: video.roll(3, dims=-1),
    "half the speed": lambda video: video[torch.arange(len(video)) // 2],
    "played backwards": lambda video: video.flip(0),
    "other colour": lambda video: video[:, [1, 2, 0]],
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("colour", COLOURS, ids=["red", "blue", "yellow"])
def test_damage_is_found_and_named(damage, reason, colour, draw_video, embedder):
    reference = draw_video(colour=colour)
    video = damage(reference)

    assert collapse_reason(video, reference) == reason
    assert collapsed(Sample("", video, reference), embedder) == 1.0


@pytest.mark.parametrize("change", MILD.values(), ids=MILD)
@pytest.mark.parametrize("colour", COLOURS, ids=["red", "blue", "yellow"])
def test_good_and_mildly_damaged_videos_pass(change, colour, draw_video, embedder):
    reference = draw_video(colour=colour)
    video = change(reference)

    assert collapse_reason(video, reference) is None
    assert collapsed(Sample("", video, reference), embedder) == 0.0


@pytest.mark.parametrize(
    "as_asked",
    [
        lambda v: torch.zeros_like(v),
        lambda v: v[:1].expand_as(v),
        lambda v: uniform_blocks(v, 1),
        lambda v: uniform_blocks(v, 8),
    ],
    ids=["black", "still", "noise", "tiles"],
)  # fmt: skip
def test_what_the_reference_shows_as_well_is_no_collapse(as_asked, draw_video):
    reference = as_asked(draw_video())

    assert collapse_reason(reference.clone(), reference) is None


def test_none_of_two_hundred_good_clips_is_called_broken():
    called = {
        seed: collapse_reason(*good_clip(seed)) for seed in range(210)
    }  # every scene with every change, five times

    assert {seed: reason for seed, reason in called.items() if reason is not None} == {}


@pytest.mark.parametrize(
    ("damage", "reason", "share"),
    [
        (lambda video: torch.zeros_like(video), "black", 1.0),
        (lambda video: video[:1].expand_as(video), "frozen", 0.6),  # a third are still or dim, and move less than 1/510
        (lambda video: torch.cat((video[:9], uniform_blocks(video, 1)[9:])), "noise", 0.9),
        (lambda video: (video + 0.6 * (uniform_blocks(video, 16) - 0.5)).clamp(0, 1), "tile mosaic", 0.8),
        (lambda video: in_blocks(video, 8), "tile mosaic", 0.7),
    ],
    ids=["black", "frozen", "last third noise", "tiles of other colours", "pixelated"],
)  # fmt: skip
def test_damage_of_good_clips_is_found_in_most_scenes(damage, reason, share):
    """Where a scene itself is still, chequered or striped at the scale of the damage, other metrics must see it."""
    references = [good_clip(seed)[1] for seed in range(42)]

    found = [collapse_reason(damage(reference), reference) for reference in references]

    assert found.count(reason) >= share * len(found)


def test_what_fired_is_said_in_words(draw_video):
    reference = draw_video()
    videos = [torch.zeros_like(reference), reference, torch.zeros_like(reference), reference[:-1]]

    words = describe_collapses([Sample("", video, reference) for video in videos])

    assert words == "black in 2 of 4 videos, wrong frame count in 1 of 4 videos"
    assert describe_collapses([Sample("", reference, reference)]) == ""


def test_every_detector_has_its_damage_here():
    assert {reason for _, reason in DAMAGE.values()} == set(DETECTORS)


def test_fine_energy_equals_a_loop_over_neighbourhoods():
    video = torch.rand(1, 1, 6, 7, generator=torch.Generator().manual_seed(3))
    plane = video[0, 0].double().numpy()
    inner = [
        (plane[r, c] - plane[r - 1 : r + 2, c - 1 : c + 2].mean()) ** 2
        for r in range(1, plane.shape[0] - 1)
        for c in range(1, plane.shape[1] - 1)
    ]

    assert fine_energy(video, 1).tolist() == pytest.approx([np.mean(inner)], rel=1e-5)


def test_fine_energy_of_white_noise_is_eight_ninths_of_its_variance():
    video = noise_like(torch.empty(4, 3, 128, 128), 0.1)

    assert float(fine_energy(video, 1).mean()) == pytest.approx(0.1**2 * 8 / 9, rel=0.03)  # 0.7 % per standard error
