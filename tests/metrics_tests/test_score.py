import math

import numpy as np
import pytest
import torch

from metrics.base import Sample
from metrics.errors import MetricError
from metrics.psnr_db import psnr_db
from metrics.registry import METRICS
from metrics.score import score_samples, summarize


class CountingEmbedder:
    def __init__(self, embedder):
        self.embedder = embedder
        self.videos = 0
        self.prompts = []

    def embed_video(self, video):
        self.videos += 1
        return self.embedder.embed_video(video)

    def embed_prompts(self, prompts):
        self.prompts += prompts
        return self.embedder.embed_prompts(prompts)


@pytest.fixture
def samples(draw_video):
    reference = draw_video(speed=2)
    return [
        Sample("a red square", draw_video(speed=1), reference),
        Sample("a blue square", draw_video(speed=2, colour=(0.1, 0.2, 0.9)), reference),
        Sample("a red square", reference, reference),
    ]


def test_values_stand_in_the_order_of_the_samples(samples, embedder):
    scores = score_samples(samples, ["psnr_db", "collapsed"], embedder)

    assert scores["psnr_db"] == [psnr_db(sample, embedder) for sample in samples]
    assert scores["collapsed"] == [0.0, 0.0, 0.0]
    assert list(scores) == ["psnr_db", "collapsed"]


def test_every_distinct_video_and_prompt_is_embedded_once(samples, embedder):
    counting = CountingEmbedder(embedder)
    score_samples(samples, [name for name, spec in METRICS.items() if "embedder" in spec.needs], counting)

    assert counting.videos == 3  # two candidates and the reference, which is also the third candidate
    assert sorted(counting.prompts) == ["a blue square", "a red square"]


def test_an_unknown_metric_is_refused_before_anything_is_embedded(samples, embedder):
    counting = CountingEmbedder(embedder)

    with pytest.raises(MetricError, match="did you mean 'clip_prompt'"):
        score_samples(samples, ["clip_reference", "clip_promt"], counting)
    assert counting.videos == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_video_that_is_not_finite_is_collapsed_and_nothing_else_is_finite(draw_video, embedder, value):
    reference = draw_video()
    video = reference.clone()
    video[:, :, 5, 5] = value
    scores = score_samples([Sample("a red square", video, reference)], list(METRICS), embedder)

    assert scores.pop("collapsed") == [1.0]
    assert {name: math.isfinite(value) for name, (value,) in scores.items()} == dict.fromkeys(scores, False)


def test_a_video_that_lacks_a_frame_is_collapsed_and_nothing_else_is_finite(draw_video, embedder):
    reference = draw_video()
    scores = score_samples([Sample("a red square", reference[:-1], reference)], list(METRICS), embedder)

    assert scores.pop("collapsed") == [1.0]
    assert {name: math.isfinite(value) for name, (value,) in scores.items()} == dict.fromkeys(scores, False)


def test_summary_is_mean_and_sample_standard_deviation():
    values = [0.5, 0.25, 1.0, 0.75]

    summary = summarize(values)

    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.std == pytest.approx(np.std(values, ddof=1))
    assert summarize([0.3]).std == 0.0


def test_a_sample_of_unequal_shapes_is_refused():
    with pytest.raises(MetricError, match=r"\[4, 3, 8, 8\] and \[4, 3, 8, 9\]"):
        Sample("", torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 9))
    with pytest.raises(MetricError, match=r"must be \[T, C, H, W\]"):
        Sample("", torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))
