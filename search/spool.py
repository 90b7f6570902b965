"""What MLflow has not taken yet, on disk: one folder per log, written whole or not at all, sent in order, then removed.

    STORE/spool/STUDY/00000001700000000000000000-trial-7/log.json
    STORE/spool/STUDY/00000001700000000000000000-trial-7/files/...

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

from search.locks import FileLock
from search.run_log import RunLog

logger = logging.getLogger(__name__)

FOLDER_MODE = 0o750
_LOG, _FILES = "log.json", "files"


class Spooled(NamedTuple):
    """One log that waits; `files` is a folder or None."""

    folder: Path
    log: RunLog
    files: Path | None


class Spool:
    """The logs of one study that wait in a store.

    Args:
        store: Folder of the store.
        study: The study's name.
    """

    def __init__(self, store: Path, study: str) -> None:
        self.folder = store / "spool" / study
        self._lock = FileLock(store / "locks" / f"{study}.spool.lock")

    def add(self, label: str, log: RunLog, files: Path | None = None) -> None:
        """Write a log and copies of its files.

        Raises:
            OSError: If the disk does not take them; nothing half-written remains.
        """
        self.folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".new-") as name:
            new = Path(name) / "new"
            new.mkdir(mode=FOLDER_MODE)
            if files is not None:
                shutil.copytree(files, new / _FILES, symlinks=True)
            (new / _LOG).write_text(log.model_dump_json())
            new.rename(self.folder / f"{time.time_ns():026d}-{label}")

    def waiting(self) -> Iterator[Spooled]:
        """Yield what waits, oldest first; what cannot be read is left where it is, with a warning."""
        for folder in sorted(self.folder.glob("[0-9]*-*")):
            try:
                log = RunLog.model_validate_json((folder / _LOG).read_bytes())
            except FileNotFoundError:
                continue  # sent by another process meanwhile
            except ValidationError:
                logger.warning("a spooled log must be whole, but %s is damaged; it is not sent", folder)
                continue
            yield Spooled(folder, log, files if (files := folder / _FILES).is_dir() else None)

    @contextmanager
    def sending(self) -> Iterator[bool]:
        """Be the only process that sends; yields False at once if another one does."""
        is_held = self._lock.acquire(blocking=False)
        try:
            yield is_held
        finally:
            self._lock.release()

    def remove(self, spooled: Spooled) -> None:
        """Take a log that was sent out of the spool."""
        (spooled.folder / _LOG).unlink(missing_ok=True)  # first: what is half removed is not sent again without files
        shutil.rmtree(spooled.folder, ignore_errors=True)
