"""Giving freed memory back to the system, so that a process that runs for days holds what it uses."""

import ctypes
import gc
import sys


def give_back() -> None:
    """Collect garbage and return free pages; glibc keeps them otherwise, a hundred megabytes and more after a trial.

    Source: malloc_trim(3); other C libraries have no such call, and give back by themselves or not at all.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
