"""What a figure may still become while some of a trial's prompts are not rendered: exact bounds, no statistics.

A mean over P prompts of which n are known lies between what it would be if all others had the lowest and if all others
had the highest value that the metric can have. A bound that lies outside this interval can no longer be met.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

from metrics.registry import known_metrics
from search.metric_names import DROP, EXCESS, WORST, worse
from search.result import MetricResult
from search.study import Constraint

Interval = tuple[float, float]
ANYTHING: Interval = (-math.inf, math.inf)
NO_FLOORS: Mapping[str, Sequence[float]] = MappingProxyType({})


def outlook(
    name: str,
    results: Mapping[str, MetricResult],
    num_prompts: int,
    floors: Mapping[str, Sequence[float]] = NO_FLOORS,
) -> Interval:
    """Return the lowest and the highest value that a figure over prompts may have in the end.

    Args:
        name: A metric, its drop, its excess, or the worst prompt of any, as study files name them.
        results: Metrics over the prompts so far, by name.
        num_prompts: How many prompts there will be.
        floors: Distances of the noise floor by metric, [num_prompts] in the same order. An excess is lowest where a
            clip is the float clip itself, at minus the floor; without a floor it may become anything.

    Returns:
        Both ends are the value itself once every prompt is known; infinite where nothing is known.
    """
    base = name.removesuffix(WORST)
    result = results.get(base)
    if result is None or not all(map(math.isfinite, result.values)):
        return ANYTHING
    low, high = _range(base)
    unknown = num_prompts - len(result.values)
    if name != base:
        worst = worse(base)(result.values)
        if unknown == 0:
            return worst, worst
        return (low, worst) if worse(base) is min else (worst, high)
    if unknown == 0:
        return result.mean, result.mean
    known = math.fsum(result.values)
    if base.endswith(EXCESS):
        distances = floors.get(base.removesuffix(EXCESS))
        nearest = math.inf if distances is None else math.fsum(distances[len(result.values) : num_prompts])
        return (known - nearest) / num_prompts, math.inf
    return (known + unknown * low) / num_prompts, (known + unknown * high) / num_prompts


def lost_constraints(
    constraints: Sequence[Constraint],
    results: Mapping[str, MetricResult],
    figures: Mapping[str, float],
    num_prompts: int,
    floors: Mapping[str, Sequence[float]] = NO_FLOORS,
) -> dict[Constraint, float]:
    """Return the constraints that can no longer be met, each with the value closest to its bounds that is left.

    Args:
        constraints: The study's bounds.
        results: Metrics over the prompts so far.
        figures: Single numbers that rendering more prompts does not make better, such as latency_ratio; those that
            were not measured yet are left out, and so are their constraints.
        num_prompts: How many prompts there will be.
        floors: As for `outlook`.
    """
    found = {}
    for bound in constraints:
        value = figures.get(bound.metric)
        low, high = outlook(bound.metric, results, num_prompts, floors) if value is None else (value, value)
        if bound.min is not None and high < bound.min:
            found[bound] = high
        elif bound.max is not None and low > bound.max:
            found[bound] = low
    return found


@cache  # plug-ins are looked for on every question
def _range(base: str) -> Interval:
    """Return the lowest and highest value of a metric or of its drop; what we do not know may be anything."""
    spec = known_metrics().get(base.removesuffix(DROP))
    if spec is None:
        return ANYTHING
    low, high = spec.range
    return (low - high, high - low) if base.endswith(DROP) else (low, high)
