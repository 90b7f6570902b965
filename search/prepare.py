"""Warm a rank up: load the model, calibrate, render the float videos, load the judge. All ranks together."""

import logging
from pathlib import Path

from hyquant.devices.base import Device
from hyquant.distributed import Group
from search.locks import HostLock
from search.objective import Stages
from search.prompts import StudyPrompts
from search.study import StudyConfig
from search.workbench import (
    Workbench,
    build_workbench,
    gather_videos,
    load_judge,
    merge_shards,
    observe_shard,
    render_references,
    stored_stats,
)

logger = logging.getLogger(__name__)


def prepare_workbench(
    config: StudyConfig, prompts: StudyPrompts, *, group: Group, device: Device, cache: Path, lock: HostLock
) -> Workbench:
    """Return a workbench that is ready for trials. What does not depend on a trial is read from the cache where it
    can be.

    Raises:
        TrialFailed: On every rank, if one rank cannot; the stage is "load", "calibrate", "reference" or "judge".
    """
    stages = Stages(group, lambda: lock.waited_s)
    bench = stages.run(
        "load", lambda: build_workbench(config, prompts, group=group, device=device, cache=cache, lock=lock)
    )
    found = stages.run("calibrate", lambda: stored_stats(bench))
    if all(group.all_gather(found is not None)) and found is not None:
        bench.stats = found
    else:
        own = stages.run("calibrate", lambda: observe_shard(bench))
        with stages.timed("calibrate"):
            merge_shards(bench, own)
    own_references = stages.run("reference", lambda: render_references(bench))
    with stages.timed("reference"):
        references = gather_videos(bench, own_references)
    if group.rank == 0:
        bench.references = references
    stages.run("judge", lambda: load_judge(bench))
    logger.info("prepared %s", " ".join(f"{stage}_s={seconds:.2f}" for stage, seconds in stages.seconds.items()))
    return bench
