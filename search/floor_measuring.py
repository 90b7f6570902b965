"""Measure a workload's noise floor once: render it under every neutral change, on all ranks, and score it on rank 0.

A study has one floor, that of the slot which measured it first: whoever has none yet takes it from the study, since
floors of other devices and numbers of ranks are other yardsticks. It is also kept in the store's cache by the digest of
all it depends on, for other studies on the same workload under the same judge. Clips under a change are not kept.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
from pydantic import JsonValue
from torch import Tensor

from hyquant.config import digest
from metrics.registry import find_metric
from metrics.score import score_samples
from search.metric_names import has_excess
from search.neutral_changes import CHANGES, NeutralChange, render_changed
from search.noise_floor import NoiseFloor, noise_floor
from search.stages import Stages
from search.workbench import Workbench, gather_videos

logger = logging.getLogger(__name__)

STAGE = "floor"

Agree = Callable[[NoiseFloor | None], NoiseFloor | None]
"""Given this slot's floor, None before it has one, returns the one of its study, None before that has one."""


def own_floor(floor: NoiseFloor | None) -> NoiseFloor | None:
    """Return this process's floor: it works for no study that others work for, too."""
    return floor


def prepare_floor(bench: Workbench, stages: Stages, agree: Agree = own_floor) -> None:
    """Set the noise floor, unless it is set or no metric has one. The denoiser must be in float. Collective.

    Float videos and judge must be ready; `agree` is asked on rank 0 alone.

    Raises:
        TrialFailed: On every rank, if one rank cannot render or rank 0 cannot score.
    """
    names = paired_metrics(bench)
    if not names or bench.floor is not None:
        return
    is_first = bench.group.rank == 0
    found = stages.run_unwatched(lambda: agree(None) or stored_floor(bench) if is_first else None)
    if not bench.group.broadcast(found is not None):
        found = _measured(bench, stages, names)
    found = stages.run_unwatched(lambda: agree(found) if is_first else None)
    told = bench.group.broadcast(None if found is None else found.model_dump(mode="json"))
    bench.floor = NoiseFloor.model_validate(told)


def paired_metrics(bench: Workbench) -> list[str]:
    """Return the study's metrics that compare with the float video."""
    return [name for name in bench.config.metrics if has_excess(find_metric(name))]


def stored_floor(bench: Workbench) -> NoiseFloor | None:
    """Return the floor of this workload from the cache, if it is there."""
    entry = bench.cache.get(floor_key(bench))
    return None if entry is None else NoiseFloor.model_validate(entry.meta)


def floor_key(bench: Workbench) -> str:
    """Return the key of the floor in the cache."""
    workload, model = bench.config.workload, bench.model
    identity: dict[str, JsonValue] = {
        "model": model.fingerprint(),
        "dtype": str(model.dtype),
        "device": str(model.device.type),
        "torch": torch.__version__,
        "pairs": [list(pair) for pair in bench.pairs],
        "settings": workload.settings.model_dump(mode="json"),
        "ranks": bench.group.world_size,
        "judge": bench.config.judge.model_dump(mode="json"),
        "metrics": list(paired_metrics(bench)),
        "changes": [change.name for change in CHANGES],
    }
    return f"floor-{digest(identity, length=32)}"


def _measured(bench: Workbench, stages: Stages, names: list[str]) -> NoiseFloor | None:
    settings = bench.config.workload.settings
    obstacles = {change.name: change.obstacle(bench.model, settings) for change in CHANGES}
    is_first = bench.group.rank == 0
    by_change: dict[str, dict[str, list[float]]] = {}
    identical: list[str] = []
    for change in CHANGES:
        if obstacles[change.name] is not None:
            continue
        own = stages.run(STAGE, partial(_render, bench, change))
        with stages.timed(STAGE):
            videos = gather_videos(bench, own)
        if is_first and all(torch.equal(*pair) for pair in zip(videos, bench.references, strict=True)):
            identical.append(change.name)
        by_change[change.name] = stages.run(STAGE, partial(_score, bench, videos, names))
    left_out = [f"{name}: {why}" for name, why in obstacles.items() if why is not None]
    return stages.run(STAGE, lambda: _concluded(bench, names, by_change, identical, left_out) if is_first else None)


def _concluded(
    bench: Workbench,
    names: list[str],
    by_change: dict[str, dict[str, list[float]]],
    identical: list[str],
    left_out: list[str],
) -> NoiseFloor:
    found = noise_floor(_score(bench, bench.references, names), by_change, identical=identical, left_out=left_out)
    bench.cache.keep(floor_key(bench), {}, found.model_dump(mode="json"))
    logger.info("noise floor %s", " ".join(f"{name}={floor.mean:.3g}" for name, floor in found.metrics.items()))
    return found


def _render(bench: Workbench, change: NeutralChange) -> list[Tensor]:
    with bench.lock.computing():
        settings, step_aside = bench.config.workload.settings, bench.lock.let_measurements_pass
        return render_changed(bench.model, change, bench.own_pairs(), settings, on_step=step_aside)


def _score(bench: Workbench, videos: list[Tensor], names: list[str]) -> dict[str, list[float]]:
    """Return the scores of clips against the float ones on rank 0, none elsewhere."""
    if bench.embedder is None:
        return {}
    with bench.lock.computing():
        return score_samples(bench.samples(videos), names, bench.embedder)
