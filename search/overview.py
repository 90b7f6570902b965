"""A study as one frozen value: what every table, plot and JSON answer is made from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import optuna
from optuna.trial import FrozenTrial

from hyquant.config import QuantConfig
from hyquant.latency_report import LatencyKind
from metrics.statistics.intervals import mean_interval
from search.confirmation import Confirmation, confirmations
from search.control import control_values
from search.metric_names import LATENT_L2
from search.noise_floor import NoiseFloor
from search.picks import Point, choose_picks, picks_of
from search.result import TrialResult
from search.scoring import latent_figure, over_prompts
from search.storage import float_scores, stored_config, stored_floor
from search.study import StudyConfig
from search.trials import (
    State,
    count_states,
    front,
    num_evaluated,
    trial_config,
    trial_reason,
    trial_result,
    trial_state,
)
from spaces.strategy import FLOAT, strategy_of


@dataclass(frozen=True)
class TrialRow:
    """One trial in words and numbers.

    Attributes:
        number: The trial's number.
        state: What became of it.
        strategy: The strategy of its config, None before one was chosen.
        config: Its config, None before one was chosen.
        result: What it found out, None if it did not get that far.
        values: What it measured for each objective; None if it did not get that far.
        reason: Why it failed, stopped, is infeasible or was not run.
        preset: The recipe it came from, if any.
        duration_s: Wall time so far or in all; None before it started.
        is_on_front: Whether no other trial dominates it.
        picks: Under which names it is offered: safe, balanced, fast.
        confirmation: What measuring it again with fresh seeds has shown; None if that was not done.
    """

    number: int
    state: State
    strategy: str | None
    config: QuantConfig | None
    result: TrialResult | None
    values: Mapping[str, float] | None
    reason: str | None
    preset: str | None
    duration_s: float | None
    is_on_front: bool
    picks: tuple[str, ...]
    confirmation: Confirmation | None = None

    def interval(self, objective: str) -> tuple[float, float] | None:
        """Return the 95 % interval of a figure, None if it has none: the worst prompt, bytes, results of old."""
        if self.result is None:
            return None
        latency = self.result.latency
        if latency is not None and latency.ratio_interval is not None and objective.startswith("latency"):
            low, high = latency.ratio_interval
            scale = 1.0 if objective == "latency_ratio" else latency.control_loop_latency_s
            return low * scale, high * scale
        if objective == LATENT_L2 and self.result.latent_l2:
            found = mean_interval([curve[-1] for curve in self.result.latent_l2], range(len(self.result.latent_l2)))
            return found.low, found.high
        metric = self.result.metrics.get(objective)
        return None if metric is None else metric.interval

    @property
    def latency_kind(self) -> LatencyKind | None:
        """Return what kind of latency it has, as latencies of two kinds are not compared; None if none, or in float."""
        return None if self.result is None or self.strategy == FLOAT else self.result.latency_kind

    @property
    def timed_on(self) -> str | None:
        """Return in words which device timed it; None if nothing was timed."""
        return None if self.result is None else self.result.timed_on

    @property
    def point(self) -> Point:
        """Return what picks are chosen from; the row has values."""
        return _point(self.number, (self.values or {}).values(), self.result)

    @property
    def measurement_error(self) -> str | None:
        """Return why its latency cannot be right, if it gains more than its ceiling."""
        latency = None if self.result is None else self.result.latency
        return None if latency is None else latency.measurement_error


@dataclass(frozen=True)
class Overview:
    """A study at one moment.

    Attributes:
        config: What the study is.
        rows: All trials by number.
        counts: How many trials are in each state.
        float_scores: Means of the float videos' metrics by name; empty until they are measured.
        floor: The noise floor, None until it is measured.
    """

    config: StudyConfig
    rows: tuple[TrialRow, ...]
    counts: Mapping[str, int]
    float_scores: Mapping[str, float]
    floor: NoiseFloor | None = None

    @property
    def front(self) -> tuple[TrialRow, ...]:
        """Return the trials that no other dominates, best quality first."""
        rows = [row for row in self.rows if row.is_on_front and row.values is not None]
        first = self.config.objectives[0]
        sign = -1.0 if first.direction == "maximize" else 1.0
        return tuple(sorted(rows, key=lambda row: (sign * (row.values or {})[first.metric], row.number)))

    @property
    def num_evaluated(self) -> int:
        """Return how many trials count towards the budget."""
        return num_evaluated(dict(self.counts))

    @property
    def time_per_trial_s(self) -> float | None:
        """Return the median wall time of the evaluated trials, None before the first."""
        times = sorted(
            row.duration_s for row in self.rows if row.state in ("complete", "infeasible") and row.duration_s
        )
        return times[len(times) // 2] if times else None

    def row(self, number: int) -> TrialRow | None:
        """Return the trial of a number, if there is one."""
        return next((row for row in self.rows if row.number == number), None)

    def picked(self, name: str) -> TrialRow | None:
        """Return the trial offered under a name ("safe", "balanced", "fast"), if there is one."""
        return next((row for row in self.rows if name in row.picks), None)


def read_overview(study: optuna.Study) -> Overview:
    """Read a stored study; nothing is written.

    Raises:
        StoreError: If the study was not made by hyq-search.
    """
    config = stored_config(study)
    metrics = tuple(objective.metric for objective in config.objectives)
    winners = front(study)
    scores, floor = float_scores(study), stored_floor(study)
    again = confirmations(study)
    candidates, float_means = _candidates(winners, again, scores)
    picks = offered(config, candidates, float_means, floor)
    on_front = {trial.number for trial in winners}
    trials = study.get_trials(deepcopy=False)
    rows = tuple(
        _row(trial, metrics, trial.number in on_front, tuple(picks_of(trial.number, picks)), again.get(trial.number))
        for trial in trials
    )
    return Overview(config=config, rows=rows, counts=count_states(trials), float_scores=scores, floor=floor)


def offered(
    config: StudyConfig, points: Sequence[Point], float_scores: Mapping[str, float], floor: NoiseFloor | None
) -> dict[str, int]:
    """Return which of a study's non-dominated points are offered, by name: see `search.picks.choose_picks`."""
    metrics = [objective.metric for objective in config.objectives]
    directions = [objective.direction for objective in config.objectives]
    return choose_picks(points, metrics, directions, control_values(metrics, float_scores, floor))


def _candidates(
    winners: Sequence[FrozenTrial], again: Mapping[int, Confirmation], scores: Mapping[str, float]
) -> tuple[list[Point], Mapping[str, float]]:
    """Return the points to pick from and the float model's scores: of fresh seeds, if any member was measured again."""
    second = [(trial.number, again[trial.number]) for trial in winners if trial.number in again]
    confirmed = [_point(number, found.values, found.result) for number, found in second if found.values is not None]
    if confirmed:
        return confirmed, second[0][1].float_scores
    return [_point(trial.number, trial.values, trial_result(trial)) for trial in winners], scores


def _point(number: int, values: Iterable[float], result: TrialResult | None) -> Point:
    return Point(number, tuple(values), None if result is None else result.float_latency_s)


def _row(
    trial: FrozenTrial,
    metrics: tuple[str, ...],
    is_on_front: bool,
    picks: tuple[str, ...],
    confirmation: Confirmation | None,
) -> TrialRow:
    config = trial_config(trial)
    result = trial_result(trial)
    return TrialRow(
        number=trial.number,
        state=trial_state(trial),
        strategy=None if config is None else strategy_of(config),
        config=config,
        result=result,
        values=None if result is None else objective_values(result, metrics),
        reason=trial_reason(trial) or (None if confirmation is None else confirmation.reason),
        preset=trial.user_attrs.get("preset"),
        duration_s=_duration_s(trial),
        is_on_front=is_on_front,
        picks=picks,
        confirmation=confirmation,
    )


def objective_values(result: TrialResult, metrics: tuple[str, ...]) -> dict[str, float] | None:
    """Return what a result measured for each objective, or None if one was not measured.

    An infeasible trial, which Optuna is told without values, has them too; one that ended before all of its prompts
    were rendered has none, because means over other prompts are other quantities.
    """
    if result.values is not None:
        return dict(zip(metrics, result.values, strict=True))
    if result.num_prompts is not None:
        return None
    measured = over_prompts(result.metrics)
    measured["weight_bytes"] = float(result.weight_bytes)
    measured |= latent_figure(result.latent_l2)
    if result.latency is not None:
        measured |= {"latency_ratio": result.latency.ratio, "latency_s": result.latency.loop_latency_s}
    return {name: measured[name] for name in metrics} if all(name in measured for name in metrics) else None


def _duration_s(trial: FrozenTrial) -> float | None:
    if trial.datetime_start is None:
        return None
    started = trial.datetime_start
    ended = trial.datetime_complete or datetime.now(started.tzinfo or None)
    return max(0.0, (ended - started).total_seconds())
