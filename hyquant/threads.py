"""How many threads torch computes in."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def one_thread_of_arithmetic() -> AbstractContextManager[None]:
    """Let torch compute in one thread while the context lasts.

    Torch's threads wait for one another by spinning, which takes the processor from others, and which small operations
    do not get back on cores that others want too.
    """
    return threads_of_arithmetic(1)


@contextmanager
def threads_of_arithmetic(num_threads: int) -> Iterator[None]:
    """Let torch compute in so many threads while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
