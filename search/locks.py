"""Locks between processes of one host: the kernel releases them when a process dies, so none is ever left behind.

`FileLock` is one flock. `HostLock` lets every compute stage run beside others but a latency measurement run alone: a
readers-writer lock whose turnstile keeps new readers out while a writer waits, so that a writer is not starved.
Renderings pass the turnstile after every denoising step, so a measurement waits for one step and not for one trial.
"""

import fcntl
import itertools
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from search.errors import StoreError

_MOMENTARY = ("mlflow.lock", ".spool.lock")
"""Locks of a store that are held for single steps of the work, and say nothing about whether any is being done."""


class FileLock:
    """An advisory lock on a file, shared or exclusive, held by this object until released or its process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self, *, shared: bool = False, blocking: bool = True) -> bool:
        """Take the lock; return False if it is held elsewhere and `blocking` is off.

        Raises:
            StoreError: If the lock file cannot be made.
        """
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        if self._file is None:
            self._file = _open(self.path)
        try:
            fcntl.flock(self._file, mode if blocking else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Give the lock up; releasing one that is not held does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def fileno(self) -> int:
        """Return the descriptor of a lock that is held; a process that inherits it holds the lock too."""
        assert self._file is not None, "only a lock that is held has a descriptor"
        return self._file.fileno()

    @contextmanager
    def held(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the lock for a block, waiting for it as long as needed."""
        self.acquire(shared=shared)
        try:
            yield
        finally:
            self.release()


def is_held(path: Path) -> bool:
    """Say whether some process holds the lock of a file; makes no file, and holds it for the moment of asking."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def held_by_workers(store: Path, pattern: str = "*.lock") -> Iterator[Path]:
    """Yield the locks of a store, of some names, that a runner, worker or command of this host holds at work."""
    for path in (store / "locks").glob(pattern):
        if not path.name.endswith(_MOMENTARY) and is_held(path):
            yield path


@contextmanager
def at_work(store: Path, command: str) -> Iterator[None]:
    """Let `held_by_workers` show for a block that a command has a store in hand; any number of them may at once.

    A store in which no lock can be made is used without one.
    """
    locks = (FileLock(store / "locks" / f"{command}-{number}.lock") for number in itertools.count())
    try:
        lock = next(lock for lock in locks if lock.acquire(blocking=False))
    except StoreError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


class HostLock:
    """Many may compute, or one may measure.

    Attributes:
        waited_s: Seconds this object has spent waiting, so that stage times can leave them out.
        waiting_since: When the wait in progress began, by `time.perf_counter`; None if there is none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = default_lock_folder() if folder is None else folder
        self._turnstile = FileLock(folder / "turnstile.lock")
        self._room = FileLock(folder / "room.lock")
        self.waited_s = 0.0
        self.waiting_since: float | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute beside others; a measurement elsewhere is waited for first."""
        self._enter(shared=True)
        try:
            yield
        finally:
            self._room.release()

    def let_measurements_pass(self) -> None:
        """Step aside for a waiting measurement; call it between steps inside `computing`."""
        self._room.release()
        self._enter(shared=True)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure alone: wait until every computation on this host has stepped aside, and hold them back."""
        self._enter(shared=False)
        try:
            yield
        finally:
            self._room.release()

    def _enter(self, *, shared: bool) -> None:
        started = time.perf_counter()
        self.waiting_since = started
        try:
            with self._turnstile.held():
                self._room.acquire(shared=shared)
        finally:
            self.waiting_since = None
            self.waited_s += time.perf_counter() - started

    def waited_until_now_s(self) -> float:
        """Return `waited_s` with a wait in progress; for another thread than the one that waits."""
        since, waited_s = self.waiting_since, self.waited_s
        return waited_s if since is None else waited_s + time.perf_counter() - since


def default_lock_folder() -> Path:
    """Make and return the folder of this host's locks: one per user, shared by all studies, as they share the devices.

    It bears the user's number, because the variables with the name keep that of whoever became another user.

    Raises:
        StoreError: If it cannot be made, or is somebody else's: whoever may write there could hold up every study.
    """
    folder = Path(tempfile.gettempdir()) / f"hyq-search-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            folder.chmod(0o700)
            return folder
    except OSError as error:
        raise StoreError(f"the lock folder {folder} must be usable, but is not: {error.strerror}; free it") from error
    raise StoreError(f"the lock folder {folder} must be a folder of this user, but is not; remove it or set TMPDIR")


def _open(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")
    except OSError as error:
        raise StoreError(
            f"a lock file must be writable, but {path} is not: {error.strerror}; free or move it"
        ) from error
