"""What lies about in a store: damaged or unknown cache entries, what killed writers left, artifacts of runs long gone.

What was touched in the last minutes may be in the making and is passed over, so looking while a study runs is harmless.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hyquant.calibration.records import INDEX, are_intact
from hyquant.calibration.store import Store
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
    folder, entries = store / "cache", Store(store / "cache")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or not _is_settled(path):
            continue
        if path.is_dir() and not path.is_symlink() and (path / INDEX).exists():
            if not are_intact(path):
                yield _damaged(store, path)
        elif path.suffix == ".json":
            if not entries.has(path.stem):
                yield _damaged(store, path, path.with_suffix(".safetensors"))
        elif path.suffix == ".safetensors":
            if not path.with_suffix(".json").exists() and is_forgotten(path):
                yield _damaged(store, path)
        else:
            yield Finding(
                "cache",
                f"{path} is no entry of a cache",
                f"is moved to {store / _UNKNOWN}",
                partial(_move_aside, store, path),
            )


def writer_findings(store: Path, study: str) -> Iterator[Finding]:
    """Find what killed writers left: half-written files, and clips of a certificate's repetition."""
    half_written = (*(store / "cache").glob(".*"), *(store / "logs" / study).rglob(".*.*"))
    for path in (*half_written, *store.glob(".again-*")):
        if is_forgotten(path):
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
            yield Finding("artifacts", f"{path} belongs to no MLflow run", "is removed", partial(remove, path, store))


def _damaged(store: Path, *paths: Path) -> Finding:
    def mend() -> None:
        for path in paths:
            remove(path, store)

    return Finding("cache", f"entry {paths[0]} is damaged", "is removed, and built again when it is needed", mend)


def _move_aside(store: Path, path: Path) -> None:
    (store / _UNKNOWN).mkdir(exist_ok=True)
    path.rename(store / _UNKNOWN / f"{time.time_ns()}-{path.name}")


def _is_settled(path: Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > SETTLE_S
    except FileNotFoundError:
        return False
