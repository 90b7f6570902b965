"""Does each metric keep its margin? From scores of float and candidate clips to one verdict per metric: pure functions.

A margin holds for the mean over all prompts, of which the held-out ones are a sample. Two tests per metric ask
whether that mean is shown to lie within the margin, or shown to lie beyond it; p values of all metrics are adjusted
together by Holm's method, once for passing and once for failing. A metric of flags (0 or 1) is about the share of
prompts with a flawed clip, and is counted exactly. Where all prompts score the same, only their number speaks for the
candidate: its p value has a floor, which says what they may all have missed and is not corrected.

    P pairs of prompt and seed   K prompts
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hyquant.config import FrozenModel
from metrics.base import Direction, MetricSpec
from metrics.statistics.clusters import Floats, cluster_means
from metrics.statistics.holm import holm_adjusted
from metrics.statistics.intervals import mean_interval
from metrics.statistics.non_inferiority import is_steady, p_above, p_below, p_share_above, p_share_below, p_unseen
from metrics.statistics.sample_sizes import clusters_to_pass, clusters_to_pass_share
from metrics.statistics.verdict import Verdict, verdict_of
from search.margins import Margin

FLAG_UNIT = "0 or 1"


@dataclass(frozen=True)
class PairedScores:
    """One metric of all pairs.

    Attributes:
        spec: The metric.
        margin: What it must keep.
        values: [P], of the candidate's clips.
        float_values: [P], of the float clips; for metrics with a reference, of a float clip against itself.
    """

    spec: MetricSpec
    margin: Margin
    values: tuple[float, ...]
    float_values: tuple[float, ...]


class MetricVerdict(FrozenModel):
    """What the held-out clips say about one metric.

    Attributes:
        margin: What was promised.
        mean: Mean over prompts of the candidate's clips; of flags, the share of flawed clips.
        float_mean: The same of the float clips.
        difference: Candidate minus float.
        low: Lower end of the difference's bootstrap interval, clustered by prompt.
        high: Its upper end.
        level: What the interval covers.
        p: p value of "it is at or beyond its margin"; small values speak for the candidate.
        p_adjusted: The same after Holm's correction, in which a p value at its floor counts as 0; at most alpha passes.
        p_beyond_adjusted: Corrected p value of "it is at or within its margin"; at most alpha fails.
        new_prompts: How many prompts a new certificate, on prompts of its own, needs to pass in 80 % of cases if they
            are like these, at least as many as there are; None unless inconclusive, or if no number would do.
        reason: The verdict in a sentence.
        values: [P], the candidate's scores in the order of the pairs.
        float_values: [P], the float clips'.
    """

    metric: str
    unit: str
    direction: Direction
    margin: Margin
    verdict: Verdict
    mean: float | None
    float_mean: float
    difference: float | None
    low: float | None
    high: float | None
    level: float
    p: float
    p_adjusted: float
    p_beyond_adjusted: float
    new_prompts: int | None
    reason: str
    values: tuple[float | None, ...]
    float_values: tuple[float, ...]


def margin_verdicts(
    scores: Sequence[PairedScores], prompts: Sequence[Hashable], *, alpha: float
) -> tuple[MetricVerdict, ...]:
    """Return the verdict over every metric, in the order given.

    Args:
        scores: One per margin; float values are finite.
        prompts: [P], which prompt each pair is of; every prompt has as many pairs.
        alpha: Error rate of passing, and of failing, over all metrics together.
    """
    within = {scored.spec.name: _p_within(scored, prompts) for scored in scores}
    beyond = {scored.spec.name: _p_beyond(scored, prompts) for scored in scores}
    floors = {scored.spec.name: _floor(scored, prompts) for scored in scores}
    tested = {name: 0.0 if p <= floors[name] else p for name, p in within.items()}
    passing, failing = holm_adjusted(tested), holm_adjusted(beyond)
    return tuple(
        _verdict(
            scored,
            prompts,
            p=within[scored.spec.name],
            p_adjusted=max(passing[scored.spec.name], floors[scored.spec.name]),
            p_beyond_adjusted=failing[scored.spec.name],
            alpha=alpha,
            own_alpha=alpha / _holm_factor(scored.spec.name, tested),
        )
        for scored in scores
    )


def allowed_share(margin: Margin, spec: MetricSpec) -> float | None:
    """Return the share of flawed prompts that a margin on a metric of flags allows; None if it states none."""
    if margin.loss is not None:
        return margin.loss
    if spec.direction == "minimize":
        return margin.max if margin.min is None else None
    return 1.0 - margin.min if margin.min is not None and margin.max is None else None


def _holm_factor(name: str, p_values: Mapping[str, float]) -> int:
    """Return what Holm's method multiplies a p value by: the number of those that are not smaller; 1 for certainty."""
    if p_values[name] == 0.0:
        return 1
    order = sorted(p_values, key=lambda other: p_values[other])
    return len(order) - order.index(name)


def _verdict(
    scored: PairedScores,
    prompts: Sequence[Hashable],
    *,
    p: float,
    p_adjusted: float,
    p_beyond_adjusted: float,
    alpha: float,
    own_alpha: float,
) -> MetricVerdict:
    verdict = verdict_of(p_adjusted, p_beyond_adjusted, alpha)
    needed = _new_prompts(scored, prompts, own_alpha) if verdict == "INCONCLUSIVE" else None
    known = _is_finite(scored)
    float_mean = float(cluster_means(scored.float_values, prompts).mean())
    interval = None
    if known:
        differences = [value - reference for value, reference in zip(scored.values, scored.float_values, strict=True)]
        interval = mean_interval(differences, prompts, level=1.0 - alpha)
    return MetricVerdict(
        metric=scored.spec.name,
        unit=scored.spec.unit,
        direction=scored.spec.direction,
        margin=scored.margin,
        verdict=verdict,
        mean=float(cluster_means(scored.values, prompts).mean()) if known else None,
        float_mean=float_mean,
        difference=None if interval is None else interval.mean,
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        level=1.0 - alpha,
        p=p,
        p_adjusted=p_adjusted,
        p_beyond_adjusted=p_beyond_adjusted,
        new_prompts=needed,
        reason=_sentence(scored, prompts, verdict, needed),
        values=tuple(value if math.isfinite(value) else None for value in scored.values),
        float_values=scored.float_values,
    )


def _p_within(scored: PairedScores, prompts: Sequence[Hashable]) -> float:
    if not _is_finite(scored):
        return 1.0
    if scored.spec.unit == FLAG_UNIT:
        return p_share_below(_num_flawed(scored, prompts), len(set(prompts)), _share(scored))
    return max(float(p_below(means_K, limit)) for means_K, limit in _sides(scored, prompts))


def _p_beyond(scored: PairedScores, prompts: Sequence[Hashable]) -> float:
    if not _is_finite(scored):
        return 0.0
    if scored.spec.unit == FLAG_UNIT:
        return p_share_above(_num_flawed(scored, prompts), len(set(prompts)), _share(scored))
    sides = _sides(scored, prompts)
    return min(1.0, len(sides) * min(float(p_above(means_K, limit)) for means_K, limit in sides))


def _floor(scored: PairedScores, prompts: Sequence[Hashable]) -> float:
    """Return below what p value no evidence goes: `p_unseen` where all prompts score the same, else 0."""
    if not _is_finite(scored) or scored.spec.unit == FLAG_UNIT:
        return 0.0
    return p_unseen(len(set(prompts))) if is_steady(_sides(scored, prompts)[0][0]) else 0.0


def _sides(scored: PairedScores, prompts: Sequence[Hashable]) -> list[tuple[Floats, float]]:
    """Return what must be shown: means per prompt, [K], and the limit below which their mean must lie."""
    margin = scored.margin
    if margin.loss is not None:
        sign = 1.0 if scored.spec.direction == "maximize" else -1.0
        losses = [sign * (own - value) for value, own in zip(scored.values, scored.float_values, strict=True)]
        return [(cluster_means(losses, prompts), margin.loss)]
    means_K = cluster_means(scored.values, prompts)
    sides = [] if margin.max is None else [(means_K, margin.max)]
    return sides if margin.min is None else [*sides, (-means_K, -margin.min)]


def _share(scored: PairedScores) -> float:
    """Return the share of flawed prompts that a margin on flags allows."""
    share = allowed_share(scored.margin, scored.spec)
    assert share is not None, "checked when the study file was read"
    return share


def _num_flawed(scored: PairedScores, prompts: Sequence[Hashable]) -> int:
    """Count the prompts with a flawed clip; with a `loss`, only where the float clip is not flawed too."""
    good = 1.0 if scored.spec.direction == "maximize" else 0.0
    flawed = {
        prompt
        for prompt, value, own in zip(prompts, scored.values, scored.float_values, strict=True)
        if value != good and (scored.margin.loss is None or own == good)
    }
    return len(flawed)


def _new_prompts(scored: PairedScores, prompts: Sequence[Hashable], alpha: float) -> int | None:
    """Return how many new prompts should do: never fewer than were not enough."""
    at_hand = len(set(prompts))
    if scored.spec.unit == FLAG_UNIT:
        share = _num_flawed(scored, prompts) / at_hand
        return clusters_to_pass_share(share, _share(scored), at_least=at_hand, alpha=alpha)
    return most_of(
        clusters_to_pass(means_K, limit, at_least=at_hand, alpha=alpha) for means_K, limit in _sides(scored, prompts)
    )


def most_of(sizes: Iterable[int | None]) -> int | None:
    """Return the largest of several sample sizes; None if one of them is None, so that no number would do."""
    found = list(sizes)
    known = [size for size in found if size is not None]
    return max(known) if known and len(known) == len(found) else None


def _is_finite(scored: PairedScores) -> bool:
    return all(map(math.isfinite, scored.values))


def _sentence(scored: PairedScores, prompts: Sequence[Hashable], verdict: Verdict, needed: int | None) -> str:
    if not _is_finite(scored):
        lost = int(np.sum(~np.isfinite(scored.values)))
        return f"{lost} of {len(scored.values)} clips have no finite score"
    if verdict == "PASS":
        return "shown to be within its margin"
    if verdict == "FAIL":
        return "shown to be beyond its margin"
    if needed is not None:
        return f"neither shown; a certificate on {needed} new prompts should do if they are like these"
    if scored.spec.unit == FLAG_UNIT:
        return f"neither shown; {_num_flawed(scored, prompts)} of {len(set(prompts))} prompts have a flawed clip"
    return "neither shown, and the mean is not within the margin clearly enough for more prompts to show it"
