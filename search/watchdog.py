"""Ends a worker that hangs: rank 0 watches its own stages, and with them all ranks, which it meets at their ends.

A thread adds up how long the present stage has run. Over the limit it writes why into the slot's folder and all stacks
into its log, and kills the process; torchrun then ends the other ranks, stopped ones too, and starts the group anew. A
driver call that holds Python's interpreter lock stops this thread as well; for that `faulthandler` keeps a timer
outside of Python. Its clock runs on while a process is stopped: one that is stopped for longer than what is left of the
limit and `BACKSTOP_S` is ended when it wakes. A rank 0 that is stopped as a whole, while its runner is not, renews no
lease, which the runner sees (`search.watching`).
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hyquant.calibration.store import write_atomically

logger = logging.getLogger(__name__)

TICK_S = 1.0
MAX_STEP_S = 10.0
"""What one look may add: a machine that slept, or a process that was stopped for a while, did not hang."""
BACKSTOP_S = 60.0
"""How much later than this module's thread the timer outside of Python ends a process."""


class Watchdog:
    """Watches one stage after the other.

    Args:
        limit_s: Seconds that a stage may take, by its name.
        waited_s: Seconds spent waiting for locks so far, a wait in progress included; they do not count.
        give_up: Called with a sentence when a stage is over its limit; not expected to return.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        limit_s: Callable[[str], float],
        waited_s: Callable[[], float],
        give_up: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        tick_s: float = TICK_S,
    ) -> None:
        self._limit_s = limit_s
        self._waited_s = waited_s
        self._give_up = give_up
        self._clock = clock
        self._tick_s = tick_s

    @contextmanager
    def watching(self, stage: str) -> Iterator[None]:
        """Watch a stage for the length of a block."""
        is_over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stage, is_over), name=f"watch-{stage}", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            is_over.set()
            watcher.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, stage: str, is_over: threading.Event) -> None:
        limit_s, active_s = self._limit_s(stage), 0.0
        looked, waited = self._clock(), self._waited_s()
        while True:
            faulthandler.dump_traceback_later(limit_s - active_s + BACKSTOP_S, exit=True)
            if is_over.wait(self._tick_s):
                return
            now, waited_now = self._clock(), self._waited_s()
            active_s += max(0.0, min(now - looked, MAX_STEP_S) - (waited_now - waited))
            looked, waited = now, waited_now
            if active_s > limit_s:
                self._give_up(f"stage {stage} hung for {active_s:.0f} s (limit {limit_s:.0f} s)")
                return


def end_hung_process(folder: Path, trial: int | None, sentence: str) -> None:
    """Leave word in a slot's folder, write all stacks to stderr, and kill this process.

    Args:
        folder: Folder of the slot.
        trial: The trial in hand; None if none is.
        sentence: What hung, and for how long.
    """
    logger.error("%s", sentence)
    if trial is not None:
        write_atomically(_note(folder, trial), sentence.encode())
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    os.kill(os.getpid(), signal.SIGKILL)


def read_hang(folder: Path, trial: int) -> str | None:
    """Return why the worker of a trial ended itself; None if it did not."""
    try:
        return _note(folder, trial).read_text()
    except FileNotFoundError:
        return None


def _note(folder: Path, trial: int) -> Path:
    return folder / f"hung-{trial}.txt"
