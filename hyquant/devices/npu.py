"""Ascend devices through torch_npu, the only module that imports it.

Importing torch_npu registers the device type "npu" with torch and adds `torch.npu`, whose functions mirror
`torch.cuda`. Work is queued: a host timer means something only after `synchronize`.
"""

import gc
import importlib
import importlib.util
import time
from types import ModuleType

import torch

from hyquant.errors import DeviceUnavailable

_INSTALL = (
    "install CANN, source its set_env.sh and install the torch_npu of this torch (`pip install hyq-search[npu] "
    "-c constraints-npu.txt`), or use device cpu"
)


class NpuDevice:
    """The `Device` protocol for Ascend NPUs."""

    name = "npu"
    process_group_backend = "hccl"
    visible_devices_env = "ASCEND_RT_VISIBLE_DEVICES"

    def is_available(self) -> bool:
        """Tell whether torch_npu loads and sees a device."""
        try:
            self.require()
        except DeviceUnavailable:
            return False
        return True

    def require(self) -> None:
        """Import torch_npu and check that it sees a device.

        Raises:
            DeviceUnavailable: If torch_npu is not installed, does not load (no CANN, another torch) or sees no device.
        """
        if not _runtime().npu.is_available():
            raise DeviceUnavailable(
                "device npu needs a visible Ascend card, but torch_npu sees none; check npu-smi info and "
                "ASCEND_RT_VISIBLE_DEVICES, or use device cpu"
            )

    def num_devices(self) -> int:
        """Return how many NPUs torch_npu sees."""
        return int(_runtime().npu.device_count())

    def torch_device(self, index: int = 0) -> torch.device:
        """Return the NPU with this index among the visible ones."""
        _runtime()
        return torch.device("npu", index)

    def synchronize(self, index: int = 0) -> None:
        """Wait until all queued work of the device is done, torch_npu's host queue included."""
        _runtime().npu.synchronize(index)

    def now_s(self, index: int = 0) -> float:
        """Return a monotonic time in seconds, after all queued work is done."""
        self.synchronize(index)
        return time.perf_counter()

    def reset_memory_peak(self, index: int = 0) -> None:
        """Start a new measurement of peak memory."""
        _runtime().npu.reset_peak_memory_stats(index)

    def release_memory(self, index: int = 0) -> None:
        """Collect garbage and empty torch_npu's cache of the device."""
        gc.collect()
        with _runtime().npu.device(index):
            _runtime().npu.empty_cache()

    def memory_peak_bytes(self, index: int = 0) -> int:
        """Return the peak of memory held by tensors since the last reset."""
        return int(_runtime().npu.max_memory_allocated(index))


def _runtime() -> ModuleType:
    if importlib.util.find_spec("torch_npu") is None:
        raise DeviceUnavailable(f"device npu needs the package torch_npu, but it is not installed; {_INSTALL}")
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        raise DeviceUnavailable(
            f"device npu needs a working torch_npu, but it does not load ({error}); {_INSTALL}"
        ) from error
