"""Laws that every metric of the table obeys."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metrics.base import Sample
from metrics.errors import MetricError
from metrics.hashing import HashingEmbedder
from metrics.registry import METRICS
from tests.toys.published_weights import put_random_weights

PERFECT = {
    "clip_reference": 1.0,
    "psnr_db": 100.0,
    "ssim": 1.0,
    "ms_ssim": 1.0,
    "lpips": 0.0,
    "dists": 0.0,
    "dino_distance": 0.0,
    "motion_energy_ratio": 1.0,
    "flicker": 0.0,
    "warping_error": 0.0,
    "collapsed": 0.0,
}
GROWS_WORSE_WITH_NOISE = (
    "clip_reference", "psnr_db", "ssim", "ms_ssim", "lpips", "dists", "flicker", "warping_error", "collapsed"
)  # fmt: skip
SIDES = {"ms_ssim": 176}
"""Pixels a side that a metric's videos must have here; 32 for the others."""

every_metric = pytest.mark.parametrize("spec", METRICS.values(), ids=METRICS)


class RefusingEmbedder:
    def embed_video(self, video):
        raise AssertionError("this metric says that it needs no embedder")

    embed_prompts = embed_video


@pytest.fixture(scope="module", autouse=True)
def random_weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        put_random_weights(tmp_path_factory.mktemp("weights"), monkeypatch)
        yield


def moving_bar(seed: int = 0, *, frames: int = 6, side: int = 32) -> Tensor:
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


def side_for(name: str) -> int:
    return SIDES.get(name, 32)


def noisy(seed: int) -> Callable[[int], Sample]:
    def sample(side: int) -> Sample:
        reference = moving_bar(seed, side=side)
        return Sample("a bar moves down", with_noise(reference, 0.1), reference)

    return sample


SAMPLES: dict[str, Callable[[int], Sample]] = {
    **{f"noisy {seed}": noisy(seed) for seed in range(4)},
    "other video": lambda side: Sample("two bars", moving_bar(1, side=side), moving_bar(2, side=side)),
    "black": lambda side: Sample("", torch.zeros(6, 3, side, side), moving_bar(3, side=side)),
    "one frame": lambda side: Sample("still", moving_bar(4, side=side)[:1], moving_bar(5, side=side)[:1]),
}


@every_metric
def test_the_table_names_each_metric_as_it_names_itself(spec):
    assert METRICS[spec.name] is spec


@every_metric
def test_its_facts_are_complete(spec):
    assert spec.direction in ("maximize", "minimize")
    assert spec.unit
    assert spec.range[0] < spec.range[1]
    assert "video" in spec.needs
    assert spec.looks_at
    assert spec.blind_to.endswith(".")
    assert spec.cost in ("low", "medium", "high", "the judge's")
    assert (spec.cost == "the judge's") == ("embedder" in spec.needs)
    assert spec.of_itself is None or "reference" in spec.needs
    assert spec.function.__doc__


@every_metric
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_values_are_finite_numbers_in_the_range(spec, sample):
    value = spec.function(sample(side_for(spec.name)), HashingEmbedder())

    assert isinstance(value, float)
    assert math.isfinite(value)
    assert spec.range[0] - 1e-6 <= value <= spec.range[1] + 1e-6


@every_metric
def test_frames_are_too_small_below_the_smallest_side_and_not_at_it(spec):
    sample = noisy(0)(32 if spec.smallest_side < 32 else spec.smallest_side)

    def cut(side):
        return Sample(sample.prompt, sample.video[..., :side, :], sample.reference[..., :side, :])

    assert math.isfinite(spec.function(cut(spec.smallest_side), HashingEmbedder()))
    if spec.smallest_side > 1:
        with pytest.raises(MetricError, match=f"at least {spec.smallest_side} pixels a side"):
            spec.function(cut(spec.smallest_side - 1), HashingEmbedder())


@every_metric
def test_it_reads_only_what_it_says(spec):
    embedder = HashingEmbedder() if "embedder" in spec.needs else RefusingEmbedder()
    side = side_for(spec.name)
    sample = Sample("a bar", with_noise(moving_bar(0, side=side), 0.1), moving_bar(0, side=side))
    other_prompt = Sample("a wolf", sample.video, sample.reference)
    other_reference = Sample(sample.prompt, sample.video, moving_bar(7, side=side))
    value = spec.function(sample, embedder)

    assert (spec.function(other_prompt, embedder) == value) == ("prompt" not in spec.needs)
    if "reference" not in spec.needs:
        assert spec.function(other_reference, embedder) == value


@every_metric
def test_it_is_repeatable_and_leaves_its_sample_alone(spec):
    reference = moving_bar(0, side=side_for(spec.name))
    video = with_noise(reference, 0.1)
    sample = Sample("a bar", video.clone(), reference.clone())

    first, second = (spec.function(sample, HashingEmbedder()) for _ in range(2))

    assert first == second
    assert torch.equal(sample.video, video)
    assert torch.equal(sample.reference, reference)


@pytest.mark.parametrize("name", PERFECT)
def test_the_reference_itself_has_the_perfect_value(name):
    video = moving_bar(0, side=side_for(name))

    value = METRICS[name].function(Sample("a bar", video.clone(), video), HashingEmbedder())

    assert value == pytest.approx(PERFECT[name], abs=1e-4)  # ssim subtracts float32 squares to get variances
    assert METRICS[name].of_itself == PERFECT[name]


@pytest.mark.parametrize("name", GROWS_WORSE_WITH_NOISE)
def test_more_noise_never_scores_better(name):
    spec, reference = METRICS[name], moving_bar(0, side=side_for(name))
    values = [
        spec.function(Sample("a bar", with_noise(reference, scale), reference), HashingEmbedder())
        for scale in (0.0, 0.03, 0.1, 0.3, 1.0)
    ]

    worst_last = sorted(values, reverse=spec.direction == "maximize")

    assert values == worst_last
    assert values[0] != values[-1]


def test_every_metric_that_needs_a_reference_has_a_perfect_value_here():
    assert set(PERFECT) == {name for name, spec in METRICS.items() if "reference" in spec.needs}
