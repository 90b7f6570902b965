"""What the library needs of a kind of device: discovery, synchronization, time, memory and names of back ends."""

from typing import Protocol

import torch


class Device(Protocol):
    """A kind of device. Implementations are stateless and import their runtime on first use."""

    @property
    def name(self) -> str:
        """Return torch's device type: "cpu", "cuda" or "npu"."""
        ...

    @property
    def process_group_backend(self) -> str:
        """Return the back end of torch.distributed for tensors on this device."""
        ...

    @property
    def visible_devices_env(self) -> str | None:
        """Return the environment variable that limits a process to some devices; None where there is none."""
        ...

    def is_available(self) -> bool:
        """Tell whether runtime and at least one device are there; never raises."""
        ...

    def require(self) -> None:
        """Make the runtime usable.

        Raises:
            DeviceUnavailable: If runtime or device are missing; the message says how to get them.
        """
        ...

    def num_devices(self) -> int:
        """Return how many devices this process sees; 1 for the CPU."""
        ...

    def torch_device(self, index: int = 0) -> torch.device:
        """Return the torch device with this index among the visible ones."""
        ...

    def synchronize(self, index: int = 0) -> None:
        """Wait until all queued work of the device is done."""
        ...

    def now_s(self, index: int = 0) -> float:
        """Return a monotonic time in seconds, after all queued work is done."""
        ...

    def reset_memory_peak(self, index: int = 0) -> None:
        """Start a new measurement of peak memory, where the device can."""
        ...

    def release_memory(self, index: int = 0) -> None:
        """Give back what the allocator keeps for reuse, after garbage was collected: a clean start after a failure."""
        ...

    def memory_peak_bytes(self, index: int = 0) -> int:
        """Return the peak of memory since the last reset; on the CPU, of the process since its start."""
        ...
