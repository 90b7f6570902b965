"""How many threads torch computes in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_of_arithmetic() -> Iterator[None]:
    """Let torch compute in one thread while the context lasts.

    Torch's threads wait for one another by spinning, which takes the processor from others, and which small operations
    do not get back on cores that others want too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
