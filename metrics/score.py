"""Score rendered videos by metric names: samples in, one list of numbers per metric out."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metrics.base import Sample
from metrics.embedders import Embedder
from metrics.registry import find_metric


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of one metric over samples."""

    mean: float
    std: float


def score_samples(samples: Sequence[Sample], names: Sequence[str], embedder: Embedder) -> dict[str, list[float]]:
    """Return each metric's values in the order of the samples.

    A video that is not whole, with pixels that are not finite or another number of frames than the reference, has
    values that are not finite, except `collapsed`, which is 1.

    Args:
        samples: What was rendered, with references.
        names: Metrics of `metrics.registry`, ours or from entry points.
        embedder: From `load_embedder`; asked once per distinct tensor and prompt.

    Raises:
        MetricError: If a name is unknown, before anything is computed, or a sample is unfit for a metric.
    """
    specs = [find_metric(name) for name in names]
    once = _EmbedOnce(embedder)
    whole = [sample.is_whole for sample in samples]
    return {
        spec.name: [
            spec.function(sample, once) if is_whole or spec.judges_ruins else math.nan
            for sample, is_whole in zip(samples, whole, strict=True)
        ]
        for spec in specs
    }


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and sample standard deviation (n - 1); the deviation of a single value is 0."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return Summary(mean=statistics.fmean(values), std=std)


class _EmbedOnce:
    """An embedder that remembers its answers while one set of samples is scored.

    Tensors are known by identity; each is kept beside its answer, so that its identity cannot pass to another one.
    """

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._videos: dict[int, tuple[Tensor, Tensor]] = {}
        self._prompts: dict[str, Tensor] = {}

    def embed_video(self, video: Tensor) -> Tensor:
        if id(video) not in self._videos:
            self._videos[id(video)] = (video, self._embedder.embed_video(video))
        return self._videos[id(video)][1]

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts]
        if new:
            self._prompts.update(zip(new, self._embedder.embed_prompts(new), strict=True))
        return torch.stack([self._prompts[prompt] for prompt in prompts])
