"""Ctrl-C and SIGTERM without breaking into a database transaction: they are counted, and asked for between steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_PATIENCE = 3


class Interrupts:
    """How often the user has asked to stop: once gracefully, twice by force; a third time breaks in anywhere."""

    def __init__(self) -> None:
        self.count = 0
        self._event = threading.Event()

    def wait(self, seconds: float) -> None:
        """Sleep, and raise KeyboardInterrupt as soon as the user has asked to stop."""
        if self._event.wait(seconds):
            raise KeyboardInterrupt

    def note(self, number: int, frame: FrameType | None) -> None:
        """Count one signal; installed as its handler."""
        self.count += 1
        self._event.set()
        if self.count >= _PATIENCE:
            raise KeyboardInterrupt


class Leaving(Interrupts):
    """Leave at leisure: the first signal asks to leave, the next one breaks off.

    Args:
        leave: Called once, at the first signal.
        is_hasty: Whether the first signal breaks off already.
    """

    def __init__(self, leave: Callable[[], None], *, is_hasty: bool) -> None:
        super().__init__()
        self._leave = leave
        self._num_calm = 0 if is_hasty else 1
        self._is_leaving = False

    def wait(self, seconds: float) -> None:
        """Sleep; see to a signal that came."""
        if not self._event.wait(seconds):
            return
        self._event.clear()
        if self.count > self._num_calm:
            raise KeyboardInterrupt
        if not self._is_leaving:
            self._is_leaving = True
            self._leave()


@contextmanager
def counted_interrupts(interrupts: Interrupts | None = None) -> Iterator[Interrupts]:
    """Count SIGINT and SIGTERM for a block; only in the main thread, because Python allows handlers nowhere else."""
    interrupts = interrupts or Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    previous = {number: signal.signal(number, interrupts.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
