"""Stages of a trial: what several ranks do together, and where errors are caught.

This is the one place that catches. Our own errors, out-of-memory and disks that are full or broken fail the trial;
anything else is a bug and ends the workers. A rank that fails a stage does not leave it alone, or the others would wait
for it for ever: failures are exchanged at the end of every stage, and all ranks raise the same `TrialFailed` or
`StageBug`.
"""

import errno
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from optuna import TrialPruned
from optuna.exceptions import UpdateFinishedTrialError

from hyquant.config import FrozenModel
from hyquant.distributed import Group
from hyquant.errors import HyquantError
from metrics.errors import MetricError
from search.errors import DiskTrouble, OutOfMemory, SearchError, StageBug, TrialFailed

T = TypeVar("T")

OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory")
"""How torch's CPU allocator and back ends without an exception class of their own say it, in a RuntimeError."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Full, over the quota, or broken: what is true of the machine and not of a config."""

_LOG_LINES = 20
Kind = Literal["ours", "memory", "disk", "bug"]
_ERRORS: dict[Kind, type[TrialFailed | StageBug]] = {
    "ours": TrialFailed,
    "memory": OutOfMemory,
    "disk": DiskTrouble,
    "bug": StageBug,
}


class Failure(FrozenModel):
    """What one rank tells the others about its failed stage."""

    reason: str
    rank: int
    log: str
    kind: Kind = "ours"


@dataclass
class Stages:
    """Stages that all ranks of a group enter and leave together, and their wall times without waiting for locks.

    Attributes:
        watching: Entered with a stage's name for as long as it runs, such as a watchdog's method.
        current: The stage that was entered last.
    """

    group: Group
    waited_s: Callable[[], float] = lambda: 0.0
    watching: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()
    seconds: dict[str, float] = field(default_factory=dict)
    current: str = "start"

    def run(self, stage: str, work: Callable[[], T]) -> T:
        """Run this rank's part of a stage; no collective call may be inside.

        Raises:
            TrialFailed: On every rank, if one rank raised one of our errors; `OutOfMemory` if it ran out of memory,
                `DiskTrouble` if a disk refused.
            StageBug: On every rank, if one rank raised anything else, but what ends a trial in Optuna.
        """
        return self._run(stage, work, self.timed(stage))

    def run_unwatched(self, work: Callable[[], T]) -> T:
        """Run as `run` does what may have to wait for a database, whose own patience ends it; its time is "wait".

        Raises:
            TrialFailed: As `run`.
        """
        return self._run("wait", work, self.waiting())

    def _run(self, stage: str, work: Callable[[], T], timing: AbstractContextManager[None]) -> T:
        failure: Failure | None = None
        bug: Exception | None = None
        with timing:
            try:
                result = work()
            except (TrialPruned, UpdateFinishedTrialError):
                raise
            except Exception as error:
                log = "".join(traceback.format_exc().splitlines(keepends=True)[-_LOG_LINES:])
                kind = kind_of(error)
                failure = Failure(reason=_reason(error, kind), rank=self.group.rank, log=log, kind=kind)
                if kind == "bug":
                    bug = error
            told = self.group.all_gather(None if failure is None else failure.model_dump())
        failures = [Failure.model_validate(one) for one in told if one is not None]
        if failures:
            first = next((one for one in failures if one.kind == "bug"), failures[0])
            raise _ERRORS[first.kind](stage, first.reason, rank=first.rank, log=first.log) from bug
        return result

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add a block's wall time to a stage, and what it waited for locks to "wait"."""
        self.current = stage
        started, waited_before = time.perf_counter(), self.waited_s()
        try:
            with self.watching(stage):
                yield
        finally:
            waited = self.waited_s() - waited_before
            self._add("wait", waited)
            self._add(stage, time.perf_counter() - started - waited)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Add a block's wall time to "wait". It is not watched: whoever is waited for is, or loses a lease."""
        self.current = "wait"
        started = time.perf_counter()
        try:
            yield
        finally:
            self._add("wait", time.perf_counter() - started)

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def kind_of(error: Exception) -> Kind:
    """Say what an error is: one of ours, out-of-memory, a disk that refuses, or a bug, which ends the worker."""
    if is_disk_trouble(error):
        return "disk"
    if is_out_of_memory(error):
        return "memory"
    return "ours" if isinstance(error, (HyquantError, SearchError, MetricError)) else "bug"


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error means that the device or the host had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def is_disk_trouble(error: Exception) -> bool:
    """Say whether an error means that a disk was full, over its quota, or broken."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def _reason(error: Exception, kind: Kind) -> str:
    if kind == "bug":
        return f"{type(error).__name__}: {error}"
    text = str(error).strip() or type(error).__name__
    return f"out of memory: {text.splitlines()[0]}" if kind == "memory" else text
