"""What lies about in a store: damaged or unknown cache entries, what killed writers left, artifacts of unknown runs.

What was touched in the last minutes may be in the making and is passed over, so looking while a study runs is harmless.
What can be built again is removed, if it still is damaged by then; what nobody knows is moved to `STORE/unknown`.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hyquant.calibration.records import INDEX, are_intact
from hyquant.calibration.store import Store
from hyquant.errors import ConfigError
from hyquant.holding import is_held
from search.findings import Finding
from search.mlflow_client import artifact_runs, connect, database_path, mlflow_errors
from search.removal import remove
from search.spool import is_forgotten

if TYPE_CHECKING:
    import optuna

SETTLE_S = 60.0
"""An entry that was written so recently may not be complete yet."""

_UNKNOWN = "unknown"


def cache_findings(store: Path) -> Iterator[Finding]:
    """Find entries that are damaged or no entries at all; reads the whole cache."""
    folder = store / "cache"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or not _is_settled(path):
            continue
        try:
            yield from _entry_findings(store, path)
        except ConfigError:  # a name that no key has
            yield _unknown(store, path, "cache", "is no entry of a cache")
        except OSError as error:
            way_out = "make it readable or remove it; it is built again when it is needed"
            yield Finding("cache", f"{path} cannot be read: {error.strerror}", way_out)


def _entry_findings(store: Path, path: Path) -> Iterator[Finding]:
    if path.is_dir() and not path.is_symlink() and (path / INDEX).exists():
        yield from _damaged(store, lambda: not are_intact(path), path)
    elif path.suffix == ".json":
        entries = Store(path.parent)
        yield from _damaged(store, lambda: not entries.has(path.stem), path, path.with_suffix(".safetensors"))
    elif path.suffix == ".safetensors":
        yield from _damaged(store, lambda: not path.with_suffix(".json").exists() and is_forgotten(path), path)
    else:
        yield _unknown(store, path, "cache", "is no entry of a cache")


def writer_findings(store: Path, study: str) -> Iterator[Finding]:
    """Find what killed writers left: half-written files, and clips of a certificate's repetition."""
    half_written = (*(store / "cache").glob(".*"), *(store / "logs" / study).rglob(".*.*"))
    for path in (*half_written, *store.glob(".again-*")):
        if is_forgotten(path) and not (path.is_dir() and is_held(path)):
            yield Finding(
                "leftovers", f"{path} was left by a killed writer", "is removed", partial(remove, path, store)
            )


def hang_findings(store: Path, study: "optuna.Study") -> Iterator[Finding]:
    """Find notes about hung workers whose trial has ended since."""
    running = {trial.number for trial in study.get_trials(deepcopy=False) if not trial.state.is_finished()}
    for path in sorted((store / "logs" / study.study_name).rglob("hung-*.txt")):
        number = path.stem.removeprefix("hung-")
        if number.isdecimal() and int(number) not in running and _is_settled(path):
            sentence = path.read_text(encoding="utf-8", errors="replace").strip()
            yield Finding(
                "notes", f"trial {number} ended its worker: {sentence}", "is removed", partial(remove, path, store)
            )


def artifact_findings(store: Path) -> Iterator[Finding]:
    """Find folders of runs that the store's own MLflow database does not have, not even as deleted ones.

    Raises:
        StoreError: If the database does not answer.
    """
    folders = [
        path
        for path in sorted((store / "artifacts").glob("*"))
        if not path.is_symlink() and path.is_dir() and _is_settled(path)
    ]
    if not folders or not database_path(store).is_file():
        return
    with mlflow_errors(store):
        known = artifact_runs(connect(store))
    for path in folders:
        if len(path.name) == 32 and path.name not in known:
            yield _unknown(store, path, "artifacts", "belongs to no MLflow run")


def _damaged(store: Path, is_damaged: Callable[[], bool], *paths: Path) -> Iterator[Finding]:
    def mend() -> None:
        if is_damaged():  # a worker may have built it again since
            for path in paths:
                remove(path, store)

    if is_damaged():
        yield Finding("cache", f"entry {paths[0]} is damaged", "is removed, and built again when it is needed", mend)


def _unknown(store: Path, path: Path, part: str, what: str) -> Finding:
    return Finding(part, f"{path} {what}", f"is moved to {store / _UNKNOWN}", partial(_move_aside, store, path))


def _move_aside(store: Path, path: Path) -> None:
    (store / _UNKNOWN).mkdir(exist_ok=True)
    path.rename(store / _UNKNOWN / f"{time.time_ns()}-{path.name}")


def _is_settled(path: Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > SETTLE_S
    except FileNotFoundError:
        return False
