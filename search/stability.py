"""How firmly a pick stands: how often it would be the same pick had other prompts been drawn."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from search.control import control_values
from search.metric_names import WORST, worse
from search.overview import Overview, TrialRow
from search.picks import Direction, Point, choose_picks, losses
from search.result import MetricResult
from search.trials import is_dominated

NUM_DRAWS = 200
Indices = npt.NDArray[np.int64]


def pick_stability(overview: Overview, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> dict[str, dict[int, float]]:
    """Return for each pick the trials that resampled prompts pick under its name, and in what share of the draws.

    Prompts are drawn with replacement, each with all of its seeds, the same ones for every trial; objectives that are
    no scores over prompts, such as latencies, stay as they are. Front and picks are then chosen as always: among the
    members that were measured again, by their second values, as soon as there are some.

    Args:
        overview: The study.
        num_draws: How often prompts are drawn.
        seed: Of the draws.

    Source: the bootstrap (Efron, Annals of Statistics 7, 1979).
    """
    names = tuple(objective.metric for objective in overview.config.objectives)
    directions = tuple(objective.direction for objective in overview.config.objectives)
    rows = _candidates(overview)
    num_videos = min((len(metric.values) for row in rows for metric in _metrics(row).values()), default=0)
    num_prompts = min(num_videos, overview.config.workload.num_search_prompts)
    if num_prompts < 2:
        return {}
    control = control_values(names, _float_scores(rows, overview), overview.floor)
    drawn: dict[str, Counter[int]] = {}
    for chosen in np.random.default_rng(seed).integers(0, num_prompts, (num_draws, num_prompts)):
        points = [
            replace(row.point, values=tuple(_value(row, name, chosen, num_prompts) for name in names)) for row in rows
        ]
        for pick, number in choose_picks(_front(points, directions), names, directions, control).items():
            drawn.setdefault(pick, Counter())[number] += 1
    return {
        pick: {number: count / num_draws for number, count in counts.most_common()} for pick, counts in drawn.items()
    }


def stability_sentence(pick: str, number: int, stability: Mapping[str, Mapping[int, float]]) -> str | None:
    """Return how often a trial is the pick, and who else is; None if there are too few prompts to say."""
    if not stability:
        return None
    shares = stability.get(pick, {})
    others = [f"trial {other} in {share:.0%}" for other, share in shares.items() if other != number and share >= 0.05]
    beside = f"; else {', '.join(others)}" if others else ""
    return f"{pick} in {shares.get(number, 0.0):.0%} of resampled prompt sets{beside}"


def _candidates(overview: Overview) -> list[TrialRow]:
    """Return what may be picked: members measured again, else complete trials with latencies of the front's kind."""
    again = [row for row in overview.front if row.confirmation is not None and row.confirmation.values is not None]
    if again:
        return [_as_measured_again(row, overview) for row in again]
    kinds = {row.latency_kind for row in overview.rows if row.is_on_front and row.latency_kind is not None}
    complete = [row for row in overview.rows if row.state == "complete" and row.values]
    return [row for row in complete if row.latency_kind is None or not kinds or row.latency_kind in kinds]


def _as_measured_again(row: TrialRow, overview: Overview) -> TrialRow:
    assert row.confirmation is not None, "the caller has looked"
    names = [objective.metric for objective in overview.config.objectives]
    values = dict(zip(names, row.confirmation.values or (), strict=True))
    return replace(row, result=row.confirmation.result, values=values)


def _float_scores(rows: Sequence[TrialRow], overview: Overview) -> Mapping[str, float]:
    again = next((row.confirmation for row in rows if row.confirmation is not None), None)
    return overview.float_scores if again is None else again.float_scores


def _metrics(row: TrialRow) -> Mapping[str, MetricResult]:
    return {} if row.result is None else row.result.metrics


def _value(row: TrialRow, name: str, chosen: Indices, num_prompts: int) -> float:
    base = name.removesuffix(WORST)
    metric = _metrics(row).get(base)
    if metric is None:
        return (row.values or {})[name]
    values = [value for index in chosen for value in metric.values[index::num_prompts]]
    return float(worse(base)(values)) if name != base else float(np.mean(values))


def _front(points: Sequence[Point], directions: Sequence[Direction]) -> list[Point]:
    every = [losses(point.values, directions) for point in points]
    return [point for point, own in zip(points, every, strict=True) if not is_dominated(own, every)]
