"""How a run is watched: a bar with the time left on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from search.watching import RunEvent


def time_left_s(finished_s: Sequence[float], remaining: int) -> float | None:
    """Return how long the rest will take at the pace so far; None before two trials have finished.

    Args:
        finished_s: When trials finished. Time before the first is left out: it went into starting and warming up.
        remaining: How many are left.
    """
    if len(finished_s) < 2:
        return None
    return (finished_s[-1] - finished_s[0]) / (len(finished_s) - 1) * remaining


def in_words(seconds: float | None) -> str:
    """Return a duration as people say it: "40 s", "12 min", "3 h 20 min"; "" if it is not known."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class RunProgress(AbstractContextManager["RunProgress"]):
    """Shows the events of a run as they come.

    Args:
        stream: Where to write; a bar is drawn if it is a terminal.
        clock: Monotonic seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._finished_s: list[float] = []
        self._evaluated: int | None = None
        self._bar = _bar(stream) if stream.isatty() else None
        self._task = self._bar.add_task("starting", total=None, left="") if self._bar is not None else None

    def __enter__(self) -> "RunProgress":
        """Begin to show."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: "RunEvent") -> None:
        """Show one event."""
        evaluated = sum(event.counts.get(state, 0) for state in ("complete", "infeasible", "stopped"))
        if self._evaluated is not None and evaluated > self._evaluated:
            self._finished_s += [self._clock()] * (evaluated - self._evaluated)
        self._evaluated = evaluated
        left_s = time_left_s(self._finished_s, max(0, event.budget - evaluated))
        if self._bar is not None and self._task is not None:
            left = f"about {in_words(left_s)} left" if left_s else ""
            doing = f"trial {event.trial} done" if event.kind == "trial" else "evaluating"
            self._bar.update(self._task, completed=evaluated, total=event.budget, left=left, description=doing)
            if event.message:
                self._bar.console.print(event.message, markup=False, highlight=False)
        elif event.message:
            tail = f" [{evaluated}/{event.budget} evaluated"
            tail += f", about {in_words(left_s)} left]" if left_s else "]"
            self._stream.write(event.message + (tail if event.kind == "trial" else "") + "\n")
            self._stream.flush()


def _bar(stream: TextIO) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("evaluated"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=Console(file=stream),
        transient=True,
    )
