"""One quantized denoiser rung by rung: render some prompts, score them, and judge whether the rest is worth its time.

Rank 0 alone judges, and whether to go on is its word to the other ranks. Latency is measured after the first rung: who
breaks a bound by then never pays for it, and from then on quality can be compared at known latency.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from hyquant.latency import PreparedSteps
from hyquant.latency_report import LatencyReport
from hyquant.plan import QuantPlan
from hyquant.profile import ceiling, quantized_names
from hyquant.quantize import QuantReport
from metrics.base import Sample
from metrics.score import score_samples
from search.latents import render_compared
from search.outlook import lost_constraints
from search.profiling import predicted_latency
from search.result import MetricResult
from search.rungs import Defeat, Scored, beaten_by, rung_ends
from search.scoring import finite_curves, judge, latent_figure, measured_figures, metric_results
from search.stages import Stages
from search.study import Constraint
from search.workbench import Workbench, gather_videos

Front = Callable[[], Sequence[Scored]]


@dataclass
class Climb:
    """How far a trial got; on ranks other than 0 nothing is filled in.

    Attributes:
        report: What happened to every layer.
        samples: The rendered videos with their prompts and float videos, in the study's order of prompts.
        scores: Their values by metric.
        latent_l2: Errors of their latents by prompt and step.
        latency: None if it was not measured.
        lost: Constraints that cannot be met any more, each with the best value that is left.
        defeat: Which member of the front beat the trial.
    """

    report: QuantReport
    samples: list[Sample] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    latent_l2: tuple[tuple[float, ...], ...] = ()
    latency: LatencyReport | None = None
    lost: dict[Constraint, float] = field(default_factory=dict)
    defeat: Defeat | None = None

    def metrics(self, bench: Workbench) -> dict[str, MetricResult]:
        """Return metrics over the prompts so far; they may be not finite."""
        count = len(self.samples)
        floor = None if bench.floor is None else bench.floor.at(range(count))
        prompts = [sample.prompt for sample in self.samples]
        return metric_results(self.scores, _first(bench.float_results, count), floor, prompts=prompts)

    def lost_constraints(self, bench: Workbench) -> dict[Constraint, float]:
        """Return the constraints that cannot be met any more, each with the best value that is left."""
        constraints, num_prompts = bench.config.constraints, len(bench.pairs)
        return lost_constraints(constraints, self.metrics(bench), self.figures(bench), num_prompts, _floors(bench))

    def figures(self, bench: Workbench) -> dict[str, float]:
        """Return what is measured and not scored; the memory peak is the one so far, latents those of all prompts."""
        peak = bench.device.memory_peak_bytes(bench.device_index)
        latents = latent_figure(self.latent_l2) if len(self.latent_l2) == len(bench.pairs) else {}
        return measured_figures(self.latency, self.report.weight_bytes, peak) | latents


def climb(bench: Workbench, plan: QuantPlan, report: QuantReport, stages: Stages, front: Front) -> Climb:
    """Render until a bound is surely broken, a member of the front beats the trial, or all is rendered. Collective.

    Args:
        bench: This rank's warm state; its denoiser is quantized.
        plan: How it is quantized.
        report: What that did.
        stages: Where times and failures are kept.
        front: The members of the front at the moment; asked on rank 0 alone.

    Raises:
        TrialFailed: On every rank, if one rank failed, or if scores of all prompts are not finite though no bound is
            broken.
    """
    trial = Climb(report)
    rungs, num_prompts = bench.config.rungs, len(bench.pairs)
    ends = rung_ends(() if rungs is None else rungs.prompts, num_prompts, bench.group.world_size)
    for start, end in zip((0, *ends), ends, strict=False):
        own = stages.run("render", partial(render_compared, bench, bench.own_pairs(start, end)))
        with stages.timed("render"):
            videos, latent_l2 = gather_videos(bench, own.videos), gather_videos(bench, own.latent_l2)
        trial.latent_l2 += finite_curves(latent_l2)
        stages.run("score", partial(_score, bench, trial, videos))
        if _all_agree(bench, stages, partial(_loses, bench, trial)):
            break
        if start == 0:
            trial.latency = _measure_latency(bench, plan, stages)
        if end == num_prompts:
            break
        members = stages.run_unwatched(front if bench.group.rank == 0 else tuple)  # the database may be away
        if _all_agree(bench, stages, partial(_ends_early, bench, trial, members, len(ends) - 1)):
            break
    return trial


def _all_agree(bench: Workbench, stages: Stages, question: Callable[[], bool]) -> bool:
    """Return on every rank what rank 0 answers."""
    is_first = bench.group.rank == 0
    return bool(bench.group.broadcast(stages.run("score", lambda: is_first and question())))


def _loses(bench: Workbench, trial: Climb) -> bool:
    """Say whether a bound is surely broken, and note which."""
    trial.lost = trial.lost_constraints(bench)
    if len(trial.samples) == len(bench.pairs):
        # Fails the trial if scores are not finite, before latency is measured.
        judge(trial.metrics(bench), bench.config.constraints, {})
    return bool(trial.lost)


def _ends_early(bench: Workbench, trial: Climb, front: Sequence[Scored], num_looks: int) -> bool:
    """Say whether a bound on latency is broken or a member of the front beats the trial, and note which."""
    if _loses(bench, trial):
        return True
    assert bench.config.rungs is not None, "without rungs no trial ends early"
    scored = Scored(
        number=None,
        results=trial.metrics(bench),
        figures=trial.figures(bench),
        latency_kind=None if trial.latency is None else trial.latency.kind,
        timed_on=None if trial.latency is None else trial.latency.timed_on,
    )
    trial.defeat = beaten_by(
        scored,
        front,
        bench.config.objectives,
        num_prompts=len(bench.pairs),
        num_looks=num_looks,
        alpha=bench.config.rungs.alpha,
        floors=_floors(bench),
    )
    return trial.defeat is not None


def _score(bench: Workbench, trial: Climb, videos: Sequence[Tensor]) -> None:
    """Add the videos of a rung and their scores to a trial, on rank 0."""
    if bench.embedder is None:
        return
    samples = bench.samples(videos, start=len(trial.samples))
    with bench.lock.computing():
        scores = score_samples(samples, bench.config.metrics, bench.embedder)
    trial.samples += samples
    for name, values in scores.items():
        trial.scores.setdefault(name, []).extend(values)


def _floors(bench: Workbench) -> dict[str, Sequence[float]]:
    """Return how far float clips lie from themselves under neutral changes, by metric and prompt."""
    return {} if bench.floor is None else {name: one.distances for name, one in bench.floor.metrics.items()}


def _first(results: dict[str, MetricResult], count: int) -> dict[str, MetricResult]:
    """Return results with the values of the first prompts alone."""
    return {
        name: MetricResult(values=result.values[:count], mean=math.nan, std=math.nan)
        for name, result in results.items()
    }


def _measure_latency(bench: Workbench, plan: QuantPlan, stages: Stages) -> LatencyReport | None:
    """Compile and time the quantized denoiser on rank 0, alone on the host: the other ranks wait, other slots pause.

    A study with a device profile gets a prediction instead.
    """
    device = bench.config.latency.device_profile
    if device is not None:
        timed = bench.latency_bench
        return stages.run("latency", lambda: None if timed is None else predicted_latency(timed, plan, device))
    prepared = stages.run("compile", lambda: _prepare_latency(bench, plan))
    return stages.run("latency", lambda: _time(bench, prepared))


def _prepare_latency(bench: Workbench, plan: QuantPlan) -> PreparedSteps | None:
    if bench.latency_bench is None:
        return None
    with bench.lock.computing():
        return bench.latency_bench.prepare(plan, warmup=bench.config.latency.warmup)


def _time(bench: Workbench, prepared: PreparedSteps | None) -> LatencyReport | None:
    if bench.latency_bench is None or prepared is None:
        return None
    with bench.lock.measuring():
        report = bench.latency_bench.measure(prepared, rounds=bench.config.latency.rounds)
    if bench.profile is None:
        return report
    found = ceiling(bench.profile, quantized_names(prepared.plan))
    return report.model_copy(update={"ceiling": found, "profile_step_s": bench.profile.step_s})
