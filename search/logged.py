"""What of a trial goes to the tracking server, as flat names and numbers; units stand in the names.

Parameters come from the flattened config, metrics from the result. Nothing here talks to a server.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hyquant.config import QuantConfig
from hyquant.latents import mean_curve
from search.metric_names import WORST, worse
from search.noise_floor import NoiseFloor
from search.result import TrialResult
from spaces.strategy import strategy_of


class LoggedMetric(NamedTuple):
    """One number: its name, value and step (the prompt's index, 0 for numbers that have no steps)."""

    name: str
    value: float
    step: int = 0


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield `a.b.c`, text for every leaf of nested mappings; lists are one leaf, joined by ", "."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield name, ", ".join(str(item) for item in value)
        else:
            yield name, str(value)


def config_params(config: QuantConfig) -> dict[str, str]:
    """Return a config as flat text parameters: `strategy`, `linear.kind`, `layers.exclude`, ..."""
    return {"strategy": strategy_of(config), **dict(flatten(config.model_dump(mode="json")))}


def floor_metrics(floor: NoiseFloor) -> list[LoggedMetric]:
    """Return a study's noise floor: per metric the mean, the worst prompt, and every prompt's as a step."""
    logged: list[LoggedMetric] = []
    for name, one in floor.metrics.items():
        logged += [LoggedMetric(f"noise_floor.{name}", one.mean), LoggedMetric(f"noise_floor.{name}{WORST}", one.worst)]
        logged += [LoggedMetric(f"noise_floor.{name}_by_prompt", v, step) for step, v in enumerate(one.distances)]
    return logged


def result_metrics(result: TrialResult) -> list[LoggedMetric]:
    """Return every number of a result: means, spreads, per-prompt values as steps, latencies, constraints, stages.

    Numbers that are not finite are left out, because MLflow changes them.
    """
    logged: list[LoggedMetric] = []
    for name, metric in result.metrics.items():
        logged += [LoggedMetric(f"{name}_mean", metric.mean), LoggedMetric(f"{name}_std", metric.std)]
        logged += [LoggedMetric(f"{name}{WORST}", worse(name)(metric.values))]
        logged += _ends(name, metric.interval)
        logged += [LoggedMetric(f"{name}_by_prompt", value, step) for step, value in enumerate(metric.values)]
    if result.latency is not None:
        latency = result.latency
        logged += [
            LoggedMetric("latency_ratio", latency.ratio),
            LoggedMetric("latency_ratio_mad", latency.ratio_mad),
            LoggedMetric("loop_latency_s", latency.loop_latency_s),
            LoggedMetric("control_loop_latency_s", latency.control_loop_latency_s),
            *_ends("latency_ratio", latency.ratio_interval),
        ]
        if latency.ceiling is not None:
            logged.append(LoggedMetric("speedup_ceiling", latency.ceiling))
        logged += [LoggedMetric(f"step_latency_s.{mode}", value) for mode, value in latency.step_latency_s.items()]
    logged += [LoggedMetric(f"constraint.{name}", value) for name, value in result.constraints.items()]
    logged += [LoggedMetric(f"stage_s.{stage}", value) for stage, value in result.stage_seconds.items()]
    if result.peak_memory_bytes is not None:
        logged.append(LoggedMetric("peak_memory_bytes", float(result.peak_memory_bytes)))
    curve = mean_curve(result.latent_l2)
    logged += [LoggedMetric("latent_l2_by_step", error, step) for step, error in enumerate(curve)]
    logged += [LoggedMetric("latent_l2", error) for error in curve[-1:]]
    if result.num_prompts is not None:
        logged.append(LoggedMetric("prompts_rendered", float(result.num_prompts)))
    logged.append(LoggedMetric("weight_size_bytes", float(result.weight_bytes)))
    return [metric for metric in logged if math.isfinite(metric.value)]


def _ends(name: str, interval: tuple[float, float] | None) -> list[LoggedMetric]:
    ends = () if interval is None else zip(("low", "high"), interval, strict=True)
    return [LoggedMetric(f"{name}_{end}", value) for end, value in ends]
