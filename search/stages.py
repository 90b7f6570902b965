"""Stages of a trial: what several ranks do together, and where errors are caught.

This is the one place that catches, and it catches our own errors and out-of-memory only; anything else is a bug and
ends the worker. A rank that fails a stage does not leave it alone, or the others would wait for it for ever: failures
are exchanged at the end of every stage, and all ranks raise the same `TrialFailed`.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from hyquant.config import FrozenModel
from hyquant.distributed import Group
from hyquant.errors import HyquantError
from metrics.errors import MetricError
from search.errors import OutOfMemory, SearchError, TrialFailed

T = TypeVar("T")

OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory")
"""How torch's CPU allocator and back ends without an exception class of their own say it, in a RuntimeError."""

_LOG_LINES = 20


class Failure(FrozenModel):
    """What one rank tells the others about its failed stage."""

    reason: str
    rank: int
    log: str
    is_memory: bool = False


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
            TrialFailed: On every rank, if one rank raised one of our errors; `OutOfMemory` if it ran out of memory.
        """
        failure: Failure | None = None
        with self.timed(stage):
            try:
                result = work()
            except (HyquantError, SearchError, MetricError, MemoryError, RuntimeError) as error:
                if not is_expected(error):
                    raise
                log = "".join(traceback.format_exc().splitlines(keepends=True)[-_LOG_LINES:])
                failure = Failure(
                    reason=_reason(error), rank=self.group.rank, log=log, is_memory=is_out_of_memory(error)
                )
            told = self.group.all_gather(None if failure is None else failure.model_dump())
        failures = [Failure.model_validate(one) for one in told if one is not None]
        if failures:
            first = failures[0]
            kind = OutOfMemory if first.is_memory else TrialFailed
            raise kind(stage, first.reason, rank=first.rank, log=first.log)
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

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def is_expected(error: Exception) -> bool:
    """Say whether an error fails a trial and not the worker: one of ours, or out-of-memory."""
    return isinstance(error, (HyquantError, SearchError, MetricError)) or is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error means that the device or the host had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return (
        text
        if isinstance(error, (HyquantError, SearchError, MetricError))
        else f"out of memory: {text.splitlines()[0]}"
    )
