"""What a store may lose: pictures and videos of trials outside the study's policy, and cache entries above its quota.

Numbers stay in MLflow and Optuna, and a tag says that files were removed. Of the cache goes first what was used least
recently, nothing that cannot be built again, and nothing while a study or a command has the store in hand.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import optuna

from search.certified_clips import CERTIFIED, judged_by
from search.errors import StoreError
from search.locks import held_by_workers
from search.mlflow_client import database_path
from search.removal import is_inside, remove, size_bytes
from search.study import ArtifactsConfig
from search.tracking import Tracker
from search.trials import front, has_result

logger = logging.getLogger(__name__)

REMOVED_TAG = "hyq.files_removed"
RECENT_S = 3600.0
"""What was used so recently may be in use."""

_MEDIA = ("videos.mp4", "strip.png")


class Removal(NamedTuple):
    """What may go: the paths of one thing, their size, why, and the MLflow run they belong to."""

    paths: tuple[Path, ...]
    size_bytes: int
    why: str
    run_id: str | None = None


def removals(
    store: Path,
    study: optuna.Study,
    policy: ArtifactsConfig,
    *,
    is_server: bool,
    is_media_only: bool = False,
    is_runner: bool = False,
) -> tuple[Removal, ...]:
    """Return what the policy lets go, first what goes first; nothing is removed.

    Args:
        store: Folder of the store.
        study: The study.
        policy: Its policy.
        is_server: Whether an MLflow server keeps the artifacts; those are the server's own.
        is_media_only: Whether to leave the cache alone.
        is_runner: Whether the caller is the study's runner, whose slots have ended.

    Raises:
        StoreError: If MLflow does not answer.
    """
    media = [] if is_server else list(_media(store, study, policy))
    runner = f"{study.study_name}.runner.lock" if is_runner else None
    if policy.quota_gb is None or is_media_only or any(path.name != runner for path in held_by_workers(store)):
        return tuple(media)
    excess = _held_bytes(store) - sum(one.size_bytes for one in media) - policy.quota_gb * 1e9
    return (*media, *_least_recent(store, excess, f"the store holds more than {policy.quota_gb:g} GB"))


def shortfall(store: Path, policy: ArtifactsConfig, chosen: Sequence[Removal] = ()) -> str | None:
    """Return in a sentence that a store holds more than its quota also without what was chosen; None if it does not."""
    if policy.quota_gb is None:
        return None
    left_gb = (_held_bytes(store) - sum(one.size_bytes for one in chosen)) / 1e9
    if left_gb <= policy.quota_gb:
        return None
    return (
        f"the store must hold at most {policy.quota_gb:g} GB, but {left_gb:.4g} GB stay: artifacts within keep: "
        f"{policy.keep}, clips of certificates, and what of the cache is in use or was within the hour; keep fewer "
        "videos, raise quota_gb or try later"
    )


def apply(store: Path, study: str, chosen: Sequence[Removal]) -> int:
    """Remove what was chosen, once MLflow says so; return how many bytes went.

    What cannot be removed is warned about and stays, and so does what of the cache was used since it was chosen.
    """
    tracker, freed = Tracker(store, study), 0
    for one in chosen:
        try:
            if one.run_id is not None:
                tracker.tag(one.run_id, REMOVED_TAG, one.why)
            elif time.time() - _last_use(one.paths) < RECENT_S:
                continue
            gone = [remove(path, store) for path in one.paths]
            if all(gone):
                freed += one.size_bytes
        except (OSError, StoreError) as error:
            logger.warning("not removed from %s: %s", store, error)
    return freed


def apply_policy(store: Path, study: optuna.Study, policy: ArtifactsConfig, *, is_server: bool, at_end: bool) -> None:
    """Let a run keep its study's policy; a store that does not let it is warned about."""
    try:
        apply(
            store,
            study.study_name,
            removals(store, study, policy, is_server=is_server, is_media_only=not at_end, is_runner=True),
        )
        if at_end and (sentence := shortfall(store, policy)):
            logger.warning("%s", sentence)
    except (OSError, StoreError) as error:
        logger.warning("artifacts must be kept within the policy, but: %s", error)


def kept_trials(study: optuna.Study, policy: ArtifactsConfig) -> set[int]:
    """Return the trials whose pictures and videos stay: the front always."""
    measured = [trial.number for trial in study.get_trials(deepcopy=False) if has_result(trial)]
    if policy.keep == "all":
        return set(measured)
    latest = measured[len(measured) - min(policy.last, len(measured)) :] if policy.keep == "last" else ()
    return {*latest, *(trial.number for trial in front(study))}


def _media(store: Path, study: optuna.Study, policy: ArtifactsConfig) -> Iterator[Removal]:
    if policy.keep == "all" or not database_path(store).is_file():
        return
    holding = {path.parents[1].name for name in _MEDIA for path in (store / "artifacts").glob(f"*/artifacts/{name}")}
    numbers = Tracker.of(store, study).trial_numbers(holding)  # before the trials: newer runs are left alone
    kept = kept_trials(study, policy)
    finished = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
    for run_id, number in sorted(numbers.items(), key=itemgetter(1)):
        if number not in finished or number in kept:
            continue
        folder = store / "artifacts" / run_id / "artifacts"
        paths = tuple(path for name in _MEDIA if (path := folder / name).is_file() and is_inside(path, store))
        if paths:
            why = f"trial {number} is outside of keep: {policy.keep}"
            yield Removal(paths, sum(map(size_bytes, paths)), why, run_id)


def _least_recent(store: Path, excess: float, why: str) -> Iterator[Removal]:
    entries: dict[str, list[Path]] = {}
    kept = set(judged_by(store / "cache"))
    for path in (store / "cache").glob("[!.]*"):
        key = path.name if path.is_dir() else path.stem
        if is_inside(path, store) and key not in kept and not key.startswith(CERTIFIED):
            entries.setdefault(key, []).append(path)
    used = {key: _last_use(paths) for key, paths in entries.items()}
    for key in sorted(entries, key=lambda key: used[key]):
        if excess <= 0 or time.time() - used[key] < RECENT_S:
            return
        size = sum(map(size_bytes, entries[key]))
        excess -= size
        yield Removal(tuple(sorted(entries[key])), size, why)


def _last_use(paths: Sequence[Path]) -> float:
    """Return when an entry was written or used last (`hyquant.calibration.store.mark_used`), in seconds."""
    newest = 0.0
    for part in (part for path in paths for part in (path, *path.rglob("*"))):
        with suppress(FileNotFoundError):  # removed by somebody else meanwhile
            newest = max(newest, part.lstat().st_mtime)
    return newest


def _held_bytes(store: Path) -> int:
    return sum(size_bytes(store / name) for name in ("artifacts", "cache") if (store / name).is_dir())
