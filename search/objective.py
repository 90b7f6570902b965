"""One trial on all ranks: calibrate, quantize, render, score, measure latency, restore.

What does not depend on a trial (statistics, float videos, the judge) is made by the first trial that needs it, and
kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hyquant.calibration.calibrate import quantize_calibrated_
from hyquant.config import QuantConfig, digest
from hyquant.models.attentions import attention_blocks
from hyquant.plan import QuantPlan, build_plan
from hyquant.quantize import QuantReport, restore_
from metrics.base import Sample
from search.calibrated import calibrate_for
from search.climb import Climb, Front, climb
from search.errors import OutOfMemory
from search.floor_measuring import Agree, own_floor, prepare_floor
from search.prepare import prepare_judge
from search.provenance import Provenance, provenance_here
from search.result import MetricResult, Outcome, TrialResult
from search.rungs import Defeat
from search.scoring import Judgement, bound_in_words, explained, judge, objective_values
from search.stages import Stages
from search.study import Constraint
from search.workbench import Workbench, stats_key


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


def run_trial(
    bench: Workbench, config: QuantConfig, stages: Stages, *, front: Front = tuple, agree: Agree = own_floor
) -> Measurement | None:
    """Evaluate one config; every rank of the group calls it with the same config. The float weights are restored.

    Args:
        bench: This rank's warm state.
        config: What to evaluate.
        stages: Where times and failures are kept.
        front: The members of the front at the moment, for a study with rungs; asked on rank 0 alone.
        agree: Which noise floor the study has; asked on rank 0 alone, while the bench has none.

    Returns:
        The measurement on rank 0; None on other ranks.

    Raises:
        TrialFailed: On every rank, if a rank failed a stage; on rank 0 alone, after the last stage, if the outcome is
            not
            finite.
    """
    denoiser, is_first = bench.model.denoiser, bench.group.rank == 0
    prepare_judge(bench, stages)
    prepare_floor(bench, stages, agree)
    plan = stages.run("quantize", lambda: _plan(bench, config))
    found = calibrate_for(bench, plan, stages)
    bench.device.reset_memory_peak(bench.device_index)
    try:
        report = stages.run("quantize", lambda: quantize_calibrated_(denoiser, plan, found, bench.model.clock))
        trial = climb(bench, plan, report, stages, front)
    finally:
        restore_(denoiser)
    if not is_first:
        return None
    evidence = Evidence(plan=plan, report=report, samples=trial.samples)
    return Measurement(result=_conclude(bench, config, trial), evidence=evidence)


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


def _conclude(bench: Workbench, config: QuantConfig, trial: Climb) -> TrialResult:
    """Put a trial's outcome together; objective values exist only if it saw every prompt and no bound is violated."""
    metrics, figures = trial.metrics(bench), trial.figures(bench)
    num_done, num_prompts = len(trial.samples), len(bench.pairs)
    is_partial = num_done < num_prompts
    outcome: Outcome
    if is_partial:
        outcome = "infeasible" if trial.lost else "stopped"
        judgement = ended_early(metrics, trial.lost, trial.defeat, num_prompts)
    else:
        judgement = judge(metrics, bench.config.constraints, figures)
        outcome = "complete" if judgement.is_feasible else "infeasible"
    is_complete = outcome == "complete"
    reason = judgement.reason if outcome == "stopped" else explained(judgement.reason, trial.samples)
    return TrialResult(
        config=config,
        config_digest=digest(config),
        outcome=outcome,
        values=objective_values(bench.config.objectives, judgement.metrics, figures) if is_complete else None,
        metrics=judgement.metrics,
        latency=trial.latency,
        constraints=judgement.constraints,
        reason=reason,
        weight_bytes=int(figures["weight_bytes"]),
        peak_memory_bytes=int(figures["peak_memory_bytes"]),
        stage_seconds={},
        latent_l2=trial.latent_l2,
        num_prompts=num_done if is_partial else None,
        stopped_by=None if trial.defeat is None else trial.defeat.number,
        provenance=_provenance(bench, config),
    )


QUANTIZED_STAGES = ("quantize", "render", "score", "compile", "latency")
"""What runs out of memory here does so because of the trial's config; float alone has done the rest before."""


def out_of_memory_result(config: QuantConfig, failure: OutOfMemory) -> TrialResult | None:
    """Return the result of a config that does not fit into memory; None if it is not the config's fault."""
    if failure.stage not in QUANTIZED_STAGES:
        return None
    return TrialResult(
        config=config,
        config_digest=digest(config),
        outcome="infeasible",
        values=None,
        metrics={},
        latency=None,
        constraints={"memory": 1.0},
        reason=str(failure),
        weight_bytes=0,
        stage_seconds={},
    )


def release_memory(bench: Workbench) -> None:
    """Let the next trial start from a clean allocator."""
    bench.device.release_memory(bench.device_index)


def _provenance(bench: Workbench, config: QuantConfig) -> Provenance:
    prompts = [*bench.prompts.calibration, "", *bench.prompts.search]
    digests = {
        "model": bench.model.fingerprint(),
        "prompts": digest(list(prompts)),
        "config": digest(config),
        "calibration": stats_key(bench),
    }
    seed, ranks = bench.config.workload.seed, bench.group.world_size
    return provenance_here(bench.model.device, seed=seed, ranks=ranks, digests=digests)


def ended_early(
    metrics: Mapping[str, MetricResult], lost: Mapping[Constraint, float], defeat: Defeat | None, num_prompts: int
) -> Judgement:
    """Return what a trial amounts to that ended before all of its prompts were rendered.

    Bounds that are not decided yet are left out of its constraints: a sampler is told what is known, and no guess.

    Args:
        metrics: Metrics over the prompts so far.
        lost: Bounds that cannot be met any more, each with the best value that is left.
        defeat: Which member of the front beat it; None if bounds ended it.
        num_prompts: How many prompts there would have been.
    """
    num_done = max((len(result.values) for result in metrics.values()), default=0)
    sentences = [bound_in_words(bound, value, "is at best") for bound, value in lost.items()]
    why = "; ".join(sentences) or ("" if defeat is None else defeat.in_words())
    return Judgement(
        metrics={name: result for name, result in metrics.items() if math.isfinite(result.mean)},
        constraints={bound.metric: bound.violation(value) for bound, value in lost.items()},
        reason=f"{why}; {num_done} of {num_prompts} prompts were rendered",
    )
