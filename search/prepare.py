"""Make what trials share and no trial changes: the loaded model, statistics, float videos, the judge. All ranks
together.

Only the model is loaded before the first trial. The rest is made when a trial first needs it, read from the cache
where it can be, and timed as stages of that trial: "calibrate", "reference" and "judge".
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from hyquant.calibration.sequential import SequentialStats, observe_sequential
from hyquant.calibration.stats import Stats
from hyquant.devices.base import Device
from hyquant.distributed import Group, merge_stats
from hyquant.plan import QuantPlan
from metrics.registry import find_metric
from search.locks import HostLock
from search.parts import require_judge
from search.prompts import StudyPrompts
from search.stages import Stages
from search.study import StudyConfig
from search.workbench import (
    Workbench,
    build_workbench,
    capture_shard,
    gather_videos,
    load_judge,
    merge_shards,
    observe_shard,
    render_references,
    run_pass,
    stored_stats,
    wants_histograms,
)

logger = logging.getLogger(__name__)


def prepare_workbench(
    config: StudyConfig,
    prompts: StudyPrompts,
    *,
    group: Group,
    device: Device,
    cache: Path,
    lock: HostLock,
    shared: str | Path | None = None,
) -> Workbench:
    """Load the model on every rank, and see that the weights of judge and metrics are there.

    Raises:
        TrialFailed: On every rank, if one rank cannot; the stage is "load".
    """

    def load() -> Workbench:
        _require_weights(config)
        return build_workbench(config, prompts, group=group, device=device, cache=cache, lock=lock, shared=shared)

    stages = Stages(group, lambda: lock.waited_s)
    bench = stages.run("load", load)
    logger.info("loaded load_s=%.2f", stages.seconds["load"])
    return bench


def calibrate(bench: Workbench, stages: Stages, plan: QuantPlan) -> None:
    """Set the statistics of the calibration prompts, unless they are set. The denoiser must be in float. Collective.

    They hold histograms if the plan or the study's space needs them; a plan from outside the space may be the first
    to ask for them, and then the records are observed again.

    Raises:
        TrialFailed: On every rank, if one rank cannot calibrate.
    """
    histograms = wants_histograms(bench, plan)
    if bench.has_stats(histograms=histograms):
        return
    found = stages.run("calibrate", lambda: stored_stats(bench, histograms=histograms))
    if all(bench.group.all_gather(found is not None)) and found is not None:
        bench.stats = found
        return
    own = stages.run("calibrate", lambda: observe_shard(bench, histograms=histograms))
    with stages.timed("calibrate"):
        merge_shards(bench, own, histograms=histograms)


def calibrate_sequentially(
    bench: Workbench, plan: QuantPlan, stages: Stages, *, scales: Mapping[str, Tensor] | None
) -> SequentialStats:
    """Return the statistics of one plan under its own quantization errors; no other trial shares them. Collective.

    The denoiser must be in float, and is again on return.

    Raises:
        TrialFailed: On every rank, if one rank cannot calibrate.
    """
    records = stages.run("calibrate", lambda: capture_shard(bench))

    def join(own_pass: Callable[[], Stats]) -> Stats:
        own = stages.run("calibrate", lambda: run_pass(bench, own_pass))
        with stages.timed("calibrate"):
            return merge_stats(own, bench.group)

    return observe_sequential(bench.model.denoiser, plan, records, bench.model.clock, join=join, scales=scales)


def prepare_judge(bench: Workbench, stages: Stages) -> None:
    """Render the float videos and load the judge, unless that was done. The denoiser must be in float. Collective.

    Raises:
        TrialFailed: On every rank, if one rank cannot render or rank 0 cannot load the judge.
    """
    if bench.is_judge_ready:
        return
    own_references = stages.run("reference", lambda: render_references(bench))
    with stages.timed("reference"):
        bench.references = gather_videos(bench, own_references)
    stages.run("judge", lambda: load_judge(bench))
    bench.is_judge_ready = True


def _require_weights(config: StudyConfig) -> None:
    """Raise EmbedderMissing or WeightsMissing before the first trial and not in it."""
    require_judge(config)
    for name in config.metrics:
        find_metric(name).find_weights()
