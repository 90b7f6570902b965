"""Laws that every metric of the table obeys."""

import math

import pytest
import torch
from torch import Tensor

from metrics.base import Sample
from metrics.hashing import HashingEmbedder
from metrics.registry import METRICS

PERFECT = {"clip_reference": 1.0, "psnr_db": 100.0, "ssim": 1.0, "motion_energy_ratio": 1.0, "collapsed": 0.0}
GROWS_WORSE_WITH_NOISE = ("clip_reference", "psnr_db", "ssim", "collapsed")

every_metric = pytest.mark.parametrize("spec", METRICS.values(), ids=METRICS)


class RefusingEmbedder:
    def embed_video(self, video):
        raise AssertionError("this metric says that it needs no embedder")

    embed_prompts = embed_video


def moving_bar(seed: int = 0, *, frames: int = 6, side: int = 24) -> Tensor:
    """A bar of random colours that moves down over a random smooth ground."""
    generator = torch.Generator().manual_seed(seed)
    ground = torch.rand(3, 1, 1, generator=generator).expand(3, side, side)
    video = ground.repeat(frames, 1, 1, 1)
    for t in range(frames):
        video[t, :, 2 * t : 2 * t + 6, 3:-3] = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(seed + 1))
    return video


def with_noise(video: Tensor, scale: float) -> Tensor:
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(9))
    return (video + scale * noise).clamp(0, 1)


def samples() -> list[Sample]:
    return [
        *(Sample("a bar moves down", with_noise(moving_bar(seed), 0.1), moving_bar(seed)) for seed in range(4)),
        Sample("two bars", moving_bar(1), moving_bar(2)),
        Sample("", torch.zeros(6, 3, 24, 24), moving_bar(3)),
        Sample("still", moving_bar(4)[:1], moving_bar(5)[:1]),
    ]


@every_metric
def test_the_table_names_each_metric_as_it_names_itself(spec):
    assert METRICS[spec.name] is spec


@every_metric
def test_its_facts_are_complete(spec):
    assert spec.direction in ("maximize", "minimize")
    assert spec.unit
    assert spec.range[0] < spec.range[1]
    assert "video" in spec.needs
    assert spec.blind_to.endswith(".")
    assert spec.function.__doc__


@every_metric
@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.prompt or "black")
def test_values_are_finite_numbers_in_the_range(spec, sample):
    value = spec.function(sample, HashingEmbedder())

    assert isinstance(value, float)
    assert math.isfinite(value)
    assert spec.range[0] - 1e-6 <= value <= spec.range[1] + 1e-6


@every_metric
def test_it_reads_only_what_it_says(spec):
    embedder = HashingEmbedder() if "embedder" in spec.needs else RefusingEmbedder()
    sample = Sample("a bar", with_noise(moving_bar(0), 0.1), moving_bar(0))
    other_prompt = Sample("a wolf", sample.video, sample.reference)
    other_reference = Sample(sample.prompt, sample.video, moving_bar(7))
    value = spec.function(sample, embedder)

    assert (spec.function(other_prompt, embedder) == value) == ("prompt" not in spec.needs)
    if "reference" not in spec.needs:
        assert spec.function(other_reference, embedder) == value


@every_metric
def test_it_is_repeatable_and_leaves_its_sample_alone(spec):
    video, reference = with_noise(moving_bar(0), 0.1), moving_bar(0)
    sample = Sample("a bar", video.clone(), reference.clone())

    first, second = (spec.function(sample, HashingEmbedder()) for _ in range(2))

    assert first == second
    assert torch.equal(sample.video, video)
    assert torch.equal(sample.reference, reference)


@pytest.mark.parametrize("name", PERFECT)
def test_the_reference_itself_has_the_perfect_value(name):
    video = moving_bar(0)

    value = METRICS[name].function(Sample("a bar", video.clone(), video), HashingEmbedder())

    assert value == pytest.approx(PERFECT[name], abs=1e-4)  # ssim subtracts float32 squares to get variances


@pytest.mark.parametrize("name", GROWS_WORSE_WITH_NOISE)
def test_more_noise_never_scores_better(name):
    spec, reference = METRICS[name], moving_bar(0)
    values = [
        spec.function(Sample("a bar", with_noise(reference, scale), reference), HashingEmbedder())
        for scale in (0.0, 0.03, 0.1, 0.3, 1.0)
    ]

    worst_last = sorted(values, reverse=spec.direction == "maximize")

    assert values == worst_last
    assert values[0] != values[-1]


def test_every_metric_that_needs_a_reference_has_a_perfect_value_here():
    assert set(PERFECT) == {name for name, spec in METRICS.items() if "reference" in spec.needs}
