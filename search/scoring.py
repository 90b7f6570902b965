"""From per-prompt scores and a latency to objective values and constraints: pure functions.

Values that are not finite never reach Optuna: if a constraint on a finite value is violated (a collapsed video), the
trial is infeasible and they are left out; otherwise the trial fails.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hyquant.latency_report import LatencyReport
from hyquant.latents import mean_curve
from metrics.base import Sample
from metrics.collapsed import describe_collapses
from metrics.registry import find_metric
from metrics.score import summarize
from metrics.statistics.intervals import mean_interval
from search.errors import TrialFailed
from search.metric_names import DROP, EXCESS, LATENT_L2, WORST, has_drop, worse
from search.noise_floor import NoiseFloor
from search.result import MetricResult
from search.study import Constraint, Objective


@dataclass(frozen=True)
class Judgement:
    """What the scores of one trial amount to.

    Attributes:
        metrics: Finite metrics over the prompts.
        constraints: By metric, how far its bound is exceeded.
        reason: In words which bounds are violated; None if none is.
    """

    metrics: dict[str, MetricResult]
    constraints: dict[str, float]
    reason: str | None

    @property
    def is_feasible(self) -> bool:
        """Say whether no bound is violated."""
        return self.reason is None


def metric_results(
    scores: Mapping[str, Sequence[float]],
    float_results: Mapping[str, MetricResult],
    floor: NoiseFloor | None = None,
    *,
    prompts: Sequence[str],
) -> dict[str, MetricResult]:
    """Return every metric over the prompts, its drop against the float videos, and its excess over the floor.

    Args:
        scores: Values by metric, one per video.
        float_results: The same of the float videos, in the same prompt order, for metrics that need no reference.
        floor: The noise floor of the metrics that need one, in the same prompt order.
        prompts: The prompt of each video; videos of one prompt resemble each other, whatever their seeds.
    """
    results = {name: _result(values, prompts) for name, values in scores.items()}
    for name, values in scores.items():
        if has_drop(find_metric(name)) and name in float_results:
            sign = 1.0 if find_metric(name).direction == "maximize" else -1.0
            pairs = zip(float_results[name].values, values, strict=True)
            results[f"{name}{DROP}"] = _result([sign * (reference - value) for reference, value in pairs], prompts)
        if floor is not None and name in floor.metrics:
            results[f"{name}{EXCESS}"] = _result(floor.metrics[name].excess(values), prompts)
    return results


def judge(
    results: Mapping[str, MetricResult], constraints: Sequence[Constraint], figures: Mapping[str, float]
) -> Judgement:
    """Hold a trial against its constraints.

    Args:
        results: Metrics over prompts; they may be not finite.
        constraints: The study's bounds; those on figures that were not measured yet are left out.
        figures: Single numbers such as latency_ratio, by name.

    Raises:
        TrialFailed: If a metric is not finite while no constraint is violated.
    """
    values = {**over_prompts(results), **figures}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    violations = {
        bound.metric: bound.violation(finite[bound.metric]) for bound in constraints if bound.metric in finite
    }
    violated = [bound for bound in constraints if violations.get(bound.metric, 0.0) > 0.0]
    if not violated and len(finite) < len(values):
        names = ", ".join(sorted({*results, *figures} - finite.keys()))
        raise TrialFailed("score", f"scores must be finite, but {names} are not; look at the rendered videos")
    return Judgement(
        metrics={name: result for name, result in results.items() if name in finite},
        constraints=violations,
        reason="; ".join(bound_in_words(bound, finite[bound.metric]) for bound in violated) or None,
    )


def explained(reason: str | None, samples: Sequence[Sample]) -> str | None:
    """Return why a trial may not win, with the collapses of its videos by name: "... (black in 2 of 8 videos)"."""
    collapses = "" if reason is None else describe_collapses(samples)
    return f"{reason} ({collapses})" if collapses else reason


def measured_figures(latency: LatencyReport | None, weight_bytes: int, peak_memory_bytes: int) -> dict[str, float]:
    """Return the figures that are measured and not scored, by the name a study file uses."""
    figures = {"weight_bytes": float(weight_bytes), "peak_memory_bytes": float(peak_memory_bytes)}
    if latency is not None:
        figures |= {"latency_ratio": latency.ratio, "latency_s": latency.loop_latency_s}
    return figures


def finite_curves(errors: Sequence[Tensor]) -> tuple[tuple[float, ...], ...]:
    """Return latent errors as numbers by prompt and step, [P][N]; none if one is not finite."""
    curves = tuple(tuple(map(float, curve)) for curve in errors)
    return curves if all(math.isfinite(error) for curve in curves for error in curve) else ()


def latent_figure(curves: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean relative L2 error of the final latents over prompts, under `latent_l2`; nothing if unknown."""
    return {LATENT_L2: mean_curve(curves)[-1]} if curves else {}


def over_prompts(results: Mapping[str, MetricResult]) -> dict[str, float]:
    """Return each metric's mean over the prompts under its name, and the value of its worst prompt under `NAME_worst`.

    Neither is finite where a prompt's value is not.
    """
    means = {name: result.mean for name, result in results.items()}
    worst = {
        f"{name}{WORST}": worse(name)(result.values) if math.isfinite(result.mean) else math.nan
        for name, result in results.items()
    }
    return means | worst


def objective_values(
    objectives: Sequence[Objective], metrics: Mapping[str, MetricResult], figures: Mapping[str, float]
) -> tuple[float, ...]:
    """Return the values of the objectives in the study's order."""
    values = {**over_prompts(metrics), **figures}
    return tuple(values[objective.metric] for objective in objectives)


def bound_in_words(bound: Constraint, value: float, verb: str = "is") -> str:
    """Return what a bound asks for and what a trial has instead."""
    limits = [("at least", bound.min), ("at most", bound.max)]
    allowed = " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None)
    return f"{bound.metric} must be {allowed}, but {verb} {value:.4g}"


def _result(values: Sequence[float], prompts: Sequence[str]) -> MetricResult:
    summary = summarize(values) if all(map(math.isfinite, values)) else None
    if summary is None:
        return MetricResult(values=tuple(values), mean=math.nan, std=math.nan)
    interval = mean_interval(values, prompts)
    return MetricResult(
        values=tuple(values), mean=summary.mean, std=summary.std, interval=(interval.low, interval.high)
    )
