"""How much a study's scores move although nothing was quantized: the noise floor of its paired metrics.

The float model rendered under a neutral change, one that arithmetic on paper would not notice
(`search.neutral_changes`), gives other clips than the float model itself, because sums round differently. What such a
clip scores against the float clip bounds what any quantization can be blamed for. With s the score of a clip, p that
of the float clip against itself, per prompt:

    distance = |s - p|
    floor    = distance of the clip under the neutral change whose mean distance is largest, metric by metric
    excess   = distance of the candidate's clip - floor

An excess of 0 is as good as float under a neutral change; below 0 is better than that. It has the unit of its metric:
for `psnr_db`, whose p is the cap of 100 dB, it is floor minus value in dB, both capped. Distances count from both
sides, so for `motion_energy_ratio` frozen and flickering clips are both above the floor.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from hyquant.config import FrozenModel
from metrics.errors import MetricError

Scores = Mapping[str, Sequence[float]]
"""By metric, one value per prompt, [P]."""


class MetricFloor(FrozenModel):
    """The floor of one paired metric.

    Attributes:
        change: The neutral change that moved it farthest in the mean over prompts.
        values: [P], what the clips under that change score.
        perfect: [P], what the float clips score against themselves.
    """

    change: str
    values: tuple[float, ...]
    perfect: tuple[float, ...]

    @property
    def distances(self) -> tuple[float, ...]:
        """Return the floor of every prompt, [P]."""
        return _distances(self.values, self.perfect)

    @property
    def score(self) -> float:
        """Return what clips under the change score in the mean over prompts."""
        return fmean(self.values)

    @property
    def mean(self) -> float:
        """Return the mean floor over prompts."""
        return fmean(self.distances)

    @property
    def worst(self) -> float:
        """Return the largest floor of a prompt."""
        return max(self.distances)

    def excess(self, values: Sequence[float]) -> list[float]:
        """Return how much farther than the floor a candidate's clips are from the float ones, [P], not finite where a
        value is not.

        Raises:
            ValueError: If there is not one value per prompt of the floor.
        """
        own = _distances(values, self.perfect)
        return [distance - floor for distance, floor in zip(own, self.distances, strict=True)]


class NoiseFloor(FrozenModel):
    """The noise floor of one workload under one judge.

    Attributes:
        changes: The neutral changes that were rendered.
        identical: Those of them whose clips are the float clips, bit for bit.
        left_out: Changes that were not rendered, as "name: why".
        metrics: Floors by paired metric.
    """

    changes: tuple[str, ...]
    identical: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    metrics: dict[str, MetricFloor]

    @property
    def is_perfect(self) -> bool:
        """Say whether no neutral change moved a single bit, so that the float model shows no noise here."""
        return set(self.changes) == set(self.identical)

    def at(self, indices: Sequence[int]) -> "NoiseFloor":
        """Return the floor of some of the prompts, in the given order; which change is worst stays as it was found."""
        metrics = {
            name: floor.model_copy(
                update={
                    "values": tuple(floor.values[index] for index in indices),
                    "perfect": tuple(floor.perfect[index] for index in indices),
                }
            )
            for name, floor in self.metrics.items()
        }
        return self.model_copy(update={"metrics": metrics})


def noise_floor(
    perfect: Scores,
    by_change: Mapping[str, Scores],
    *,
    identical: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> NoiseFloor:
    """Return the floor of every metric: its values under the change that moves it most.

    Args:
        perfect: Scores of the float clips against themselves.
        by_change: Scores of the clips of each neutral change, of the same metrics and prompts.
        identical: Changes whose clips are bit-identical.
        left_out: Changes that were not rendered, and why.

    Raises:
        MetricError: If a score is not finite; a floor of it would mean nothing.
    """
    for change, scores in {"no change": perfect, **by_change}.items():
        for name, values in scores.items():
            if not all(map(math.isfinite, values)):
                raise MetricError(
                    f"a noise floor needs finite scores of float clips, but {name} has others under {change}; take it "
                    "out of metrics or look at the float videos"
                )
    floors = {}
    for name, own in perfect.items():
        candidates = [MetricFloor(change="none", values=tuple(own), perfect=tuple(own))]
        candidates += [
            MetricFloor(change=change, values=tuple(scores[name]), perfect=tuple(own))
            for change, scores in by_change.items()
        ]
        floors[name] = max(candidates, key=lambda floor: floor.mean)
    return NoiseFloor(changes=tuple(by_change), identical=tuple(identical), left_out=tuple(left_out), metrics=floors)


def _distances(values: Sequence[float], perfect: Sequence[float]) -> tuple[float, ...]:
    return tuple(abs(value - best) for value, best in zip(values, perfect, strict=True))
