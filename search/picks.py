"""Which three points of a Pareto front a user is offered.

* `safe`: best in the quality objective (the first one that is not a latency).
* `fast`: best in the latency objective (the first one whose name starts with "latency"); else no `fast`.
* `balanced`: the knee. Every objective is turned into a loss and scaled so that the front spans [0, 1]; the knee is the
  point farthest below the plane through the extremes, sum(loss) = 1. With two objectives that plane is the straight
  line between `safe` and `fast`.

Points that the float model itself beats are not offered: who is slower than float and no closer to it loses to changing
nothing. Where it beats them all (as with simulated latencies) the whole front is offered.

Ties are decided in favour of quality, then of the lower trial number, so one point alone is all three.

Source of the knee: Das, "On characterizing the 'knee' of the Pareto curve based on normal-boundary intersection",
Structural Optimization 18 (1999).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

Direction = Literal["maximize", "minimize"]
_ROUNDING = 1e-6  # a cosine of a video with itself may exceed 1 by as much
PICK_NAMES = ("safe", "balanced", "fast")


@dataclass(frozen=True)
class Point:
    """An evaluated, feasible trial.

    Attributes:
        number: The trial's number.
        values: Its objective values in the study's order.
        float_latency_s: Seconds of the float loop that was timed beside it, on the same device; None if unknown.
    """

    number: int
    values: tuple[float, ...]
    float_latency_s: float | None = None


def losses(values: Sequence[float], directions: Sequence[Direction]) -> tuple[float, ...]:
    """Return the values with every maximized one negated, so that smaller is better everywhere."""
    return tuple(-v if d == "maximize" else v for v, d in zip(values, directions, strict=True))


def choose_picks(
    front: Sequence[Point],
    objectives: Sequence[str],
    directions: Sequence[Direction],
    control: Sequence[float | None],
) -> dict[str, int]:
    """Return trial numbers by pick name; see the module text for what each pick means.

    Args:
        front: Non-dominated points; may be empty, then nothing is picked.
        objectives: Metric names in the study's order.
        directions: One direction per objective.
        control: The float model's values; with an unknown one among them it beats nobody. That of latency_s is each
            point's own.

    Returns:
        `{"safe": number, "balanced": number, "fast": number}`; `fast` is missing without a latency objective.
    """
    if not front:
        return {}
    front = [point for point in front if not beats(_beside(point, control, objectives), point, directions)] or front
    speed_index = next((i for i, name in enumerate(objectives) if name.startswith("latency")), None)
    quality_index = next((i for i in range(len(objectives)) if i != speed_index), 0)
    scaled = _scaled_losses(front, directions)

    def best(loss_of: Callable[[tuple[float, ...]], float]) -> int:
        def rank(i: int) -> tuple[float, float, float, int]:
            row = scaled[i]
            return round(loss_of(row), 12), row[quality_index], sum(row), front[i].number

        return front[min(range(len(front)), key=rank)].number

    picks = {"safe": best(itemgetter(quality_index)), "balanced": best(sum)}
    return picks if speed_index is None else {**picks, "fast": best(itemgetter(speed_index))}


def beats(control: Sequence[float | None], point: Point, directions: Sequence[Direction]) -> bool:
    """Say whether the float model is at least as good as a point in every objective."""
    known = [value for value in control if value is not None]
    if len(known) < len(point.values):
        return False
    pairs = zip(losses(known, directions), losses(point.values, directions), strict=True)
    return all(own <= other + _ROUNDING for own, other in pairs)


def _beside(point: Point, control: Sequence[float | None], objectives: Sequence[str]) -> list[float | None]:
    """Return the float model's values where a point was measured: seconds of two devices are never compared."""
    pairs = zip(objectives, control, strict=True)
    return [point.float_latency_s if name == "latency_s" else value for name, value in pairs]


def picks_of(number: int, picks: dict[str, int]) -> list[str]:
    """Return the names under which a trial was picked, in the order safe, balanced, fast."""
    return [name for name in PICK_NAMES if picks.get(name) == number]


def _scaled_losses(front: Sequence[Point], directions: Sequence[Direction]) -> list[tuple[float, ...]]:
    """Scale each objective's loss to [0, 1] over the front; an objective that does not vary becomes 0."""
    rows = [losses(point.values, directions) for point in front]
    lows = [min(column) for column in zip(*rows, strict=True)]
    spans = [max(column) - low for column, low in zip(zip(*rows, strict=True), lows, strict=True)]
    return [
        tuple((v - low) / span if span > 0 else 0.0 for v, low, span in zip(row, lows, spans, strict=True))
        for row in rows
    ]
