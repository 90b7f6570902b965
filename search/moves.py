"""Did a metric move between two renderings of the same pairs, and by more than the float model did? Pure functions.

P pairs of prompt and seed
"""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from hyquant.config import FrozenModel
from metrics.statistics.clusters import cluster_means
from metrics.statistics.holm import holm_adjusted
from metrics.statistics.non_inferiority import p_above
from search.margin_verdicts import MetricVerdict

TOLERANCE = 1e-6
"""Moves below it are roundings of a score: a cosine of a video with itself may differ from 1 by as much."""


class Move(FrozenModel):
    """How far one metric moved between a certificate and today, in its unit.

    Attributes:
        before: Mean of the candidate's clips in the certificate; None if a clip had no finite score.
        after: The same today.
        moved: Mean move of the candidate's clips; None if one has no finite score.
        floor: Mean move of the float clips; None if it is not known.
        is_beyond_floor: Whether the candidate is shown to have moved by more than float; None if it is shown to have
            moved and its floor is not known.
    """

    metric: str
    before: float | None
    after: float | None
    moved: float | None
    floor: float | None
    is_beyond_floor: bool | None

    def in_words(self) -> str:
        """Return what is shown."""
        if self.is_beyond_floor is None:
            return "moved, floor unknown"
        return "beyond its floor" if self.is_beyond_floor else "as before"


@dataclass(frozen=True)
class PairMoves:
    """Moves of the candidate's and of the float clips, [P] each, at least 0; None if they are not known."""

    candidate: Sequence[float]
    floats: Sequence[float] | None

    @property
    def is_finite(self) -> bool:
        """Say whether every clip of the candidate has a finite score."""
        return all(map(math.isfinite, self.candidate))


def judged_moves(
    before: Sequence[MetricVerdict],
    after: Sequence[MetricVerdict],
    moves: Mapping[str, PairMoves],
    prompts: Sequence[Hashable],
    *,
    alpha: float,
) -> tuple[Move, ...]:
    """Return how far each metric moved, and whether that is shown to be more than float's move.

    Args:
        before: Verdicts of the certificate.
        after: The same metrics today.
        moves: Moves of all clips by metric.
        prompts: [P], which prompt each pair is of; at least 3.
        alpha: How often a candidate that moved no farther than float may be said to, over all metrics together (Holm).
    """
    p_values = holm_adjusted({metric.metric: _p_no_farther(moves[metric.metric], prompts) for metric in before})
    return tuple(
        Move(
            metric=old.metric,
            before=old.mean,
            after=new.mean,
            moved=statistics.fmean(moves[old.metric].candidate) if moves[old.metric].is_finite else None,
            floor=_mean(moves[old.metric].floats),
            is_beyond_floor=_is_beyond_floor(moves[old.metric], p_values[old.metric] <= alpha),
        )
        for old, new in zip(before, after, strict=True)
    )


def _is_beyond_floor(moves: PairMoves, has_moved: bool) -> bool | None:
    """Return whether a move is beyond its floor; a lost clip is beyond any, one without a score that is not finite."""
    is_unknown = has_moved and moves.is_finite and moves.floats is None
    return None if is_unknown else has_moved


def _p_no_farther(moves: PairMoves, prompts: Sequence[Hashable]) -> float:
    """Return the p value of "the candidate moved no farther than float"; 0 if a clip has no finite score.

    Where float's moves are not known they count as 0: then it is about whether the candidate moved at all.
    """
    if not moves.is_finite:
        return 0.0
    floats = [0.0] * len(moves.candidate) if moves.floats is None else moves.floats
    excess = [own - other for own, other in zip(moves.candidate, floats, strict=True)]
    return float(p_above(cluster_means(excess, prompts), TOLERANCE))


def _mean(values: Sequence[float] | None) -> float | None:
    return None if values is None else statistics.fmean(values)
