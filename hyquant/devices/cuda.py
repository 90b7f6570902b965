"""NVIDIA devices through torch.cuda."""

import gc
import time

import torch

from hyquant.errors import DeviceUnavailable


class CudaDevice:
    """The `Device` protocol for CUDA."""

    name = "cuda"
    process_group_backend = "nccl"
    visible_devices_env = "CUDA_VISIBLE_DEVICES"

    def is_available(self) -> bool:
        """Tell whether torch sees a CUDA device."""
        return torch.cuda.is_available()

    def require(self) -> None:
        """Check that torch sees a CUDA device.

        Raises:
            DeviceUnavailable: If it does not.
        """
        if not self.is_available():
            raise DeviceUnavailable(
                f"device cuda needs a torch built for CUDA, a driver and a visible device, but torch "
                f"{torch.__version__} sees none; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use device cpu"
            )

    def num_devices(self) -> int:
        """Return how many devices torch sees."""
        return torch.cuda.device_count()

    def torch_device(self, index: int = 0) -> torch.device:
        """Return the CUDA device with this index among the visible ones."""
        return torch.device("cuda", index)

    def synchronize(self, index: int = 0) -> None:
        """Wait until all streams of the device are idle."""
        torch.cuda.synchronize(index)

    def now_s(self, index: int = 0) -> float:
        """Return a monotonic time in seconds, after all queued work is done."""
        self.synchronize(index)
        return time.perf_counter()

    def reset_memory_peak(self, index: int = 0) -> None:
        """Start a new measurement of peak memory."""
        torch.cuda.reset_peak_memory_stats(index)

    def release_memory(self, index: int = 0) -> None:
        """Collect garbage and empty torch's cache of the device."""
        gc.collect()
        with torch.cuda.device(index):
            torch.cuda.empty_cache()

    def memory_peak_bytes(self, index: int = 0) -> int:
        """Return the peak of memory held by tensors since the last reset."""
        return torch.cuda.max_memory_allocated(index)
