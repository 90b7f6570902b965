"""What is scored and what a metric is: `Sample` and `MetricSpec`, both frozen.

A metric is a function from one sample to one number, wrapped in the facts a reader needs: which direction is better,
unit, range, cost, what it looks at, and what it is blind to. The table of metrics is `metrics.registry.METRICS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from metrics.embedders import Embedder
from metrics.errors import MetricError

Direction = Literal["maximize", "minimize"]
Need = Literal["video", "reference", "prompt", "embedder"]
Cost = Literal["low", "medium", "high", "the judge's"]


@dataclass(frozen=True)
class Sample:
    """One rendered video, the prompt it was rendered from, and the float model's video of the same prompt and seed.

    Attributes:
        prompt: The text.
        video: [T, C, H, W] float in [0, 1]; the candidate.
        reference: The same shape; the float video. Only the number of frames may differ: that is a collapse.

    Raises:
        MetricError: If a video has not four dimensions, or the two differ in more than their frames.
    """

    prompt: str
    video: Tensor
    reference: Tensor

    def __post_init__(self) -> None:
        if self.video.dim() != 4 or self.video.shape[1:] != self.reference.shape[1:]:
            raise MetricError(
                "video and reference must be [T, C, H, W] of one shape, but got "
                f"{list(self.video.shape)} and {list(self.reference.shape)}; render both with the same settings"
            )

    @property
    def is_whole(self) -> bool:
        """Say whether the video has the reference's number of frames and only finite pixels."""
        return self.video.shape == self.reference.shape and bool(torch.isfinite(self.video).all())


MetricFunction = Callable[[Sample, Embedder], float]


def no_weights() -> tuple[Path, ...]:
    """Return the weight files of a metric that has none."""
    return ()


@dataclass(frozen=True)
class MetricSpec:
    """A metric and the facts about it.

    Attributes:
        name: As in study files and tracking; with the unit as suffix where there is one.
        direction: Which way is better. For a ratio or a flag it is the side on which damage usually lies.
        unit: "cosine", "cosine distance", "distance", "dB", "ratio", "doublings", "intensity", or "0 or 1" of a flag.
        range: Lowest and highest value; infinite where unbounded.
        needs: Which parts of a sample it reads, and whether it asks the embedder.
        looks_at: In a few words what the number is made of.
        blind_to: One sentence: the damage this metric cannot see.
        cost: Seconds for a frame of 1280 x 720 on one core of a CPU: "low" is below 0.5, "high" above 5. "the judge's"
            is one pass through the embedder, which all metrics that ask it share.
        function: From a sample and an embedder to a number.
        of_itself: Value of the float video against itself; None if it reads no reference, or has no such value.
        find_weights: Returns the files with published weights it reads, without reading them.
        smallest_side: Pixels that the shorter side of a frame must have; it raises `MetricError` for less.
        judges_ruins: Whether it has a value for videos that are not whole; the others are not asked there.
    """

    name: str
    direction: Direction
    unit: str
    range: tuple[float, float]
    needs: tuple[Need, ...]
    looks_at: str
    blind_to: str
    cost: Cost
    function: MetricFunction
    of_itself: float | None = None
    find_weights: Callable[[], tuple[Path, ...]] = no_weights
    smallest_side: int = 1
    judges_ruins: bool = False
