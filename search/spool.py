"""What MLflow has not taken yet, on disk: one folder per log, written whole or not at all, sent in order, then removed.

    STORE/spool/STUDY/00000001700000000000000000-trial-7/log.json
    STORE/spool/STUDY/00000001700000000000000000-trial-7/files/...
    STORE/spool/STUDY/aside/...                                        damaged, or refused by MLflow for good: why.txt

A log is here before anything is sent, so a process killed while it sends loses nothing. One process sends at a time.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from hyquant.calibration.store import write_atomically
from hyquant.file_modes import make_folder
from search.locks import FileLock
from search.run_log import RunLog

logger = logging.getLogger(__name__)

LEFTOVER_S = 3600.0
"""What a writer began and did not touch for so long was left by one that was killed."""

GIVE_SERVER = "give its address as --tracking-uri"
"""What to do about logs for a server that was not given."""

_LOG, _FILES, _WHY, _NEW = "log.json", "files", "why.txt", ".new-"


class Spooled(NamedTuple):
    """One log that waits; `files` is a folder or None."""

    folder: Path
    log: RunLog
    files: Path | None

    @property
    def age_s(self) -> float:
        """Return how long it has waited."""
        return time.time() - int(self.folder.name.partition("-")[0]) / 1e9


class Spool:
    """The logs of one study that wait in a store.

    Args:
        store: Folder of the store.
        study: The study's name.
    """

    def __init__(self, store: Path, study: str) -> None:
        self.folder = store / "spool" / study
        self.aside = self.folder / "aside"
        self._lock = FileLock(store / "locks" / f"{study}.spool.lock")

    def add(self, label: str, log: RunLog, files: Path | None = None) -> None:
        """Write a log and copies of its files.

        Raises:
            OSError: If the disk does not take them; nothing half-written remains.
        """
        make_folder(self.folder)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=_NEW) as name:
            new = Path(name) / "new"
            make_folder(new)
            if files is not None:
                shutil.copytree(files, new / _FILES, symlinks=True)
            write_atomically(new / _LOG, log.model_dump_json().encode())
            new.rename(self.folder / f"{time.time_ns():026d}-{label}")

    def waiting(self) -> Iterator[Spooled]:
        """Yield what waits, oldest first; what cannot be read is passed over, and nothing is changed."""
        for folder in self._folders():
            log = _read(folder)
            if log is not None:
                yield Spooled(folder, log, self.files_of(folder))

    def damaged(self) -> tuple[Path, ...]:
        """Return the folders whose log is there and cannot be read."""
        return tuple(folder for folder in self._folders() if (folder / _LOG).exists() and _read(folder) is None)

    def leftovers(self) -> tuple[Path, ...]:
        """Return what a killed writer or sender has left: unfinished logs, and files of logs that were sent."""
        sent = (folder for folder in self._folders() if not (folder / _LOG).exists())
        return tuple(path for path in (*self.folder.glob(f"{_NEW}*"), *sent) if is_forgotten(path))

    def set_aside(self, folder: Path, why: str) -> None:
        """Take a log out of the queue for good; it is kept with the reason for whoever looks."""
        make_folder(self.aside)
        (folder / _WHY).write_text(why + "\n", encoding="utf-8")
        folder.rename(self.aside / folder.name)

    def sweep(self) -> None:
        """Set damaged logs aside and remove what killed processes have left; only for the process that sends."""
        for folder in self.damaged():
            logger.warning("a spooled log must be whole, but %s is damaged; it is set aside", folder)
            self.set_aside(folder, "its log.json is damaged")
        for path in self.leftovers():
            shutil.rmtree(path, ignore_errors=True)

    def is_for_server(self) -> bool:
        """Say whether logs here, waiting or set aside, are for an MLflow server."""
        logs = map(_read, (*self._folders(), *self.aside.glob("[0-9]*-*")))
        return any(log is not None and log.is_for_server for log in logs)

    def kept_aside(self) -> tuple[tuple[Path, str], ...]:
        """Return what was set aside, and why."""
        return tuple((path.parent, path.read_text(encoding="utf-8").strip()) for path in self.aside.glob(f"*/{_WHY}"))

    @contextmanager
    def sending(self) -> Iterator[bool]:
        """Be the only process that sends; yields False at once if another one does."""
        is_held = self._lock.acquire(blocking=False)
        try:
            yield is_held
        finally:
            self._lock.release()

    def remove(self, folder: Path) -> None:
        """Take a log that was sent out of the spool."""
        (folder / _LOG).unlink(missing_ok=True)  # first: what is half removed is not sent again without files
        shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def files_of(folder: Path) -> Path | None:
        """Return the folder of the files that go with a log; None if there are none."""
        return files if (files := folder / _FILES).is_dir() else None

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*-*"))


def is_forgotten(path: Path) -> bool:
    """Say whether nothing at or below a path has changed for `LEFTOVER_S`; False if it is gone."""
    try:
        newest = max(part.lstat().st_mtime for part in (path, *path.rglob("*")))
    except FileNotFoundError:
        return False
    return time.time() - newest > LEFTOVER_S


def _read(folder: Path) -> RunLog | None:
    try:
        return RunLog.model_validate_json((folder / _LOG).read_bytes())
    except (FileNotFoundError, ValidationError):  # sent by another process meanwhile, or damaged
        return None
