"""One trial on all ranks: calibrate, quantize, render, score, measure latency, restore.

What does not depend on a trial (statistics, float videos, the judge) is made by the first trial that needs it, and
kept.
"""

from dataclasses import dataclass, replace

from hyquant.calibration.calibrate import quantize_calibrated_
from hyquant.config import QuantConfig, digest
from hyquant.latency import PreparedSteps
from hyquant.latency_report import LatencyReport
from hyquant.models.attentions import attention_blocks
from hyquant.plan import QuantPlan, build_plan
from hyquant.profile import ceiling, quantized_names
from hyquant.quantize import QuantReport, restore_
from metrics.base import Sample
from metrics.score import score_samples
from search.calibrated import calibrate_for
from search.floor_measuring import prepare_floor
from search.latents import render_compared
from search.prepare import prepare_judge
from search.profiling import predicted_latency
from search.result import MetricResult, TrialResult
from search.scoring import (
    Judgement,
    explained,
    finite_curves,
    judge,
    latent_figure,
    measured_figures,
    metric_results,
    objective_values,
)
from search.stages import Stages
from search.workbench import Workbench, gather_videos


@dataclass(frozen=True)
class Evidence:
    """What a finished trial leaves to look at, on rank 0."""

    plan: QuantPlan
    report: QuantReport
    samples: list[Sample]


@dataclass(frozen=True)
class Measurement:
    """What one trial found out, on rank 0."""

    result: TrialResult
    evidence: Evidence


def run_trial(bench: Workbench, config: QuantConfig, stages: Stages) -> Measurement | None:
    """Evaluate one config; every rank of the group calls it with the same config. The float weights are restored.

    Returns:
        The measurement on rank 0; None on other ranks.

    Raises:
        TrialFailed: On every rank, if a rank failed a stage; on rank 0 alone, after the last stage, if the outcome is
            not
            finite.
    """
    denoiser, is_first = bench.model.denoiser, bench.group.rank == 0
    prepare_judge(bench, stages)
    prepare_floor(bench, stages)
    plan = stages.run("quantize", lambda: _plan(bench, config))
    found = calibrate_for(bench, plan, stages)
    bench.device.reset_memory_peak(bench.group.local_rank)
    try:
        report = stages.run("quantize", lambda: quantize_calibrated_(denoiser, plan, found, bench.model.clock))
        own = stages.run("render", lambda: render_compared(bench, bench.search))
        with stages.timed("render"):
            videos, latent_l2 = gather_videos(bench, own.videos), gather_videos(bench, own.latent_l2)
        samples = bench.samples(videos) if is_first else []
        curves = finite_curves(latent_l2)
        metrics = stages.run("score", lambda: _score(bench, samples))
        may_win = stages.run(
            "score", lambda: judge(metrics, bench.config.constraints, latent_figure(curves)).is_feasible
        )
        is_timed = bench.group.broadcast(may_win)
        latency = _measure_latency(bench, plan, stages) if is_timed else None
    finally:
        restore_(denoiser)
    if not is_first:
        return None
    figures = measured_figures(latency, report.weight_bytes, bench.device.memory_peak_bytes(bench.group.local_rank))
    figures |= latent_figure(curves)
    judgement = judge(metrics, bench.config.constraints, figures)
    judgement = replace(judgement, reason=explained(judgement.reason, samples))
    result = _conclude(bench, config, judgement, latency, figures, curves)
    return Measurement(result=result, evidence=Evidence(plan=plan, report=report, samples=samples))


def _plan(bench: Workbench, config: QuantConfig) -> QuantPlan:
    num_steps = bench.config.workload.settings.num_steps
    model = bench.model
    return build_plan(
        model.groups(),
        config,
        num_steps=num_steps,
        model=model.name,
        target=bench.config.target,
        attentions=attention_blocks(model.denoiser),
    )


def _score(bench: Workbench, samples: list[Sample]) -> dict[str, MetricResult]:
    if bench.embedder is None:
        return {}
    with bench.lock.computing():
        scores = score_samples(samples, bench.config.metrics, bench.embedder)
    return metric_results(scores, bench.float_results, bench.floor)


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


def _conclude(
    bench: Workbench,
    config: QuantConfig,
    judgement: Judgement,
    latency: LatencyReport | None,
    figures: dict[str, float],
    latent_l2: tuple[tuple[float, ...], ...],
) -> TrialResult:
    """Put a trial's outcome together; objective values exist only if no bound is violated."""
    is_complete = judgement.is_feasible
    return TrialResult(
        config=config,
        config_digest=digest(config),
        outcome="complete" if is_complete else "infeasible",
        values=objective_values(bench.config.objectives, judgement.metrics, figures) if is_complete else None,
        metrics=judgement.metrics,
        latency=latency,
        constraints=judgement.constraints,
        reason=judgement.reason,
        weight_bytes=int(figures["weight_bytes"]),
        peak_memory_bytes=int(figures["peak_memory_bytes"]),
        stage_seconds={},
        latent_l2=latent_l2,
    )
