"""Reading ahead and writing behind: two threads and short queues, so that disk and arithmetic work side by side."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")

_WAIT_S = 0.1


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Channel(Generic[Item]):
    """A queue whose ends notice when the other end is gone."""

    def __init__(self, depth: int) -> None:
        self._queue: queue.Queue[Item | _Failed | None] = queue.Queue(depth)
        self.is_closed = threading.Event()

    def send(self, item: Item | _Failed | None) -> bool:
        """Put an item (None for the end) when there is room; return False if nobody will take it."""
        while not self.is_closed.is_set():
            try:
                self._queue.put(item, timeout=_WAIT_S)
                return True
            except queue.Full:
                continue
        return False

    def abort(self) -> None:
        """Drop what was not taken yet, and end."""
        self.is_closed.set()
        with self._queue.mutex:
            self._queue.queue.clear()
            self._queue.queue.append(None)
            self._queue.not_empty.notify()

    def receive(self) -> Iterator[Item]:
        """Yield items until the end, and raise what the sender failed with."""
        while (item := self._queue.get()) is not None:
            if isinstance(item, _Failed):
                raise item.error
            yield item
            del item  # or the last item would live until the next one comes


@contextmanager
def read_ahead(items: Iterable[Item], *, depth: int) -> Iterator[Iterator[Item]]:
    """Make items in a thread, at most `depth` of them before they are asked for; what it raises is raised here."""
    channel: _Channel[Item] = _Channel(depth)

    def run() -> None:
        try:
            for item in items:
                if not channel.send(item):
                    return
            channel.send(None)
        except BaseException as error:
            channel.send(_Failed(error))

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield channel.receive()
    finally:
        channel.is_closed.set()
        thread.join()


@contextmanager
def write_behind(consume: Callable[[Item], None], *, depth: int) -> Iterator[Callable[[Item], None]]:
    """Give a function that hands items to a thread, in order; what the thread raises is raised here, or at the end.

    If the block fails, items that were not consumed yet are dropped.
    """
    channel: _Channel[Item] = _Channel(depth)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            for item in channel.receive():
                consume(item)
                del item
        except BaseException as error:
            failures.append(error)
            channel.is_closed.set()

    def hand_over(item: Item) -> None:
        if not channel.send(item):
            raise failures[0]

    thread = threading.Thread(target=run, name="write-behind", daemon=True)
    thread.start()
    try:
        yield hand_over
        channel.send(None)
    except BaseException:
        channel.abort()
        raise
    finally:
        thread.join()
    if failures:
        raise failures[0]
