"""What is scored and what a metric is: `Sample` and `MetricSpec`, both frozen.

A metric is a function from one sample to one number, wrapped in the facts a reader needs: which direction is better,
unit, range, what it looks at, and what it is blind to. The table of metrics is `metrics.registry.METRICS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from metrics.embedders import Embedder
from metrics.errors import MetricError

Direction = Literal["maximize", "minimize"]
Need = Literal["video", "reference", "prompt", "embedder"]


@dataclass(frozen=True)
class Sample:
    """One rendered video, the prompt it was rendered from, and the float model's video of the same prompt and seed.

    Attributes:
        prompt: The text.
        video: [T, C, H, W] float in [0, 1]; the candidate.
        reference: The same shape; the float video.

    Raises:
        MetricError: If a video has not four dimensions, or the two shapes differ.
    """

    prompt: str
    video: Tensor
    reference: Tensor

    def __post_init__(self) -> None:
        if self.video.dim() != 4 or self.video.shape != self.reference.shape:
            raise MetricError(
                "video and reference must be [T, C, H, W] of one shape, but got "
                f"{list(self.video.shape)} and {list(self.reference.shape)}; render both with the same settings"
            )


MetricFunction = Callable[[Sample, Embedder], float]


@dataclass(frozen=True)
class MetricSpec:
    """A metric and the facts about it.

    Attributes:
        name: As in study files and tracking; with the unit as suffix where there is one.
        direction: Which way is better. For a ratio or a flag it is the side on which damage usually lies.
        unit: "cosine", "dB", "ratio", "0 or 1".
        range: Lowest and highest value; infinite where unbounded.
        needs: Which parts of a sample it reads, and whether it asks the embedder.
        blind_to: One sentence: the damage this metric cannot see.
        function: From a sample and an embedder to a number; not finite where the video is not.
    """

    name: str
    direction: Direction
    unit: str
    range: tuple[float, float]
    needs: tuple[Need, ...]
    blind_to: str
    function: MetricFunction
