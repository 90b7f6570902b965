"""The CPU: always there, synchronous, memory counted for the whole process."""

import resource
import sys
import time

import torch

from hyquant.memory import give_back


class CpuDevice:
    """The `Device` protocol for the CPU."""

    name = "cpu"
    process_group_backend = "gloo"
    visible_devices_env = None

    def is_available(self) -> bool:
        """Return True."""
        return True

    def require(self) -> None:
        """Do nothing: a CPU is always usable."""

    def num_devices(self) -> int:
        """Return 1: the CPU is one device."""
        return 1

    def torch_device(self, index: int = 0) -> torch.device:
        """Return the CPU; it has no index."""
        return torch.device("cpu")

    def synchronize(self, index: int = 0) -> None:
        """Do nothing: CPU operators return when they are done."""

    def now_s(self, index: int = 0) -> float:
        """Return a monotonic time in seconds."""
        return time.perf_counter()

    def reset_memory_peak(self, index: int = 0) -> None:
        """Do nothing: the system keeps one peak per process and cannot reset it."""

    def release_memory(self, index: int = 0) -> None:
        """Collect garbage and give free pages back to the system."""
        give_back()

    def memory_peak_bytes(self, index: int = 0) -> int:
        """Return the peak resident size of this process since its start (getrusage: kilobytes, on macOS bytes)."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
