"""Which kernel a Linear gets: the forced one, else the fastest of those that run here.

Where several native kernels run on a device they are timed on the layer's own shape, once per machine: the times are
kept in the user's cache, in one JSON file per device, number of threads, torch version and C code. All kernels
compute the same integers, so a choice changes how long a layer takes and nothing else.
"""

import functools
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from hyquant.calibration.store import write_atomically
from hyquant.errors import ConfigError
from hyquant.file_modes import make_folder
from hyquant.kernels import KERNELS, Int8Linear
from hyquant.kernels.reference import REFERENCE
from hyquant.kernels.x86_build import cache_folder, source_digest
from hyquant.latency_report import KernelKind
from hyquant.timing import median_seconds

logger = logging.getLogger(__name__)

FORCED = "HYQUANT_KERNEL"
"""Environment variable that names the kernel of every layer; worker processes inherit it."""

NOMINAL_ROWS = 1024
_ROUNDS = 5


@dataclass(frozen=True)
class LinearShape:
    """A Linear as kernels see it: output channels N, input channels K, and the number of rows M it is timed with."""

    num_outputs: int
    num_inputs: int
    num_rows: int = NOMINAL_ROWS

    def __str__(self) -> str:
        return f"{self.num_rows}x{self.num_inputs}->{self.num_outputs}"


def candidates(device: torch.device) -> tuple[Int8Linear, ...]:
    """Return the kernels that run on a device: the native ones, or the reference kernel where there is none."""
    native = tuple(kernel for kernel in KERNELS.values() if kernel.kind == "native" and kernel.is_available(device))
    return native or (REFERENCE,)


def kernel_for(device: torch.device, shape: LinearShape) -> Int8Linear:
    """Return the kernel that a Linear runs on.

    Raises:
        ConfigError: If the forced kernel does not exist or does not run on this device.
    """
    if forced := os.environ.get(FORCED):
        return forced_kernel(forced, device)
    found = candidates(device)
    if len(found) == 1:
        return found[0]
    times = kernel_times(device, shape)
    return KERNELS[min(times, key=lambda name: times[name])]


def kind_on(device: torch.device) -> KernelKind:
    """Return how int8 Linears run on a device, whichever of its kernels they get; nothing is timed.

    Raises:
        ConfigError: As `kernel_for`.
    """
    forced = os.environ.get(FORCED)
    return (forced_kernel(forced, device) if forced else candidates(device)[0]).kind


def forced_kernel(name: str, device: torch.device) -> Int8Linear:
    """Return the kernel of this name.

    Raises:
        ConfigError: If it does not exist or does not run on this device.
    """
    available = [kernel.name for kernel in KERNELS.values() if kernel.is_available(device)]
    if name not in available:
        raise ConfigError(f"a forced kernel must run on {device.type} here, but got '{name}'; use one of {available}.")
    return KERNELS[name]


def kernel_times(device: torch.device, shape: LinearShape) -> dict[str, float]:
    """Return seconds per call (dynamic, float32 input) of every candidate: from the cache, else measured and kept."""
    path = _cache_path(device)
    if path is None:
        return _measure(device, shape)
    key = str(shape)
    kept = _read(path)
    if key not in kept:
        kept = {**_read(path), key: _measure(device, shape)}
        _write(path, kept)
    return dict(kept[key])


def _measure(device: torch.device, shape: LinearShape) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    size = (shape.num_outputs, shape.num_inputs)
    weight = torch.randint(-127, 128, size, generator=generator, dtype=torch.int16).to(torch.int8).to(device)
    x = torch.randn(shape.num_rows, shape.num_inputs, generator=generator).to(device)
    scale = torch.ones(shape.num_outputs, 1, device=device)

    def call_of(kernel: Int8Linear) -> Callable[[], object]:
        operand = kernel.prepare(weight)
        return lambda: kernel.dynamic(x, operand, weight_scale=scale, bias=None, mul_scale=None)

    def now() -> float:
        _synchronize(device)
        return perf_counter()

    return median_seconds({kernel.name: call_of(kernel) for kernel in candidates(device)}, now, _ROUNDS)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _cache_path(device: torch.device) -> Path | None:
    """Return where the times of this machine are kept; None for a user without a home."""
    names = [kernel.name for kernel in candidates(device)]
    machine = [device_name(device), torch.__version__, str(torch.get_num_threads()), *names, source_digest()]
    try:
        folder = cache_folder()
    except RuntimeError:
        return None
    return folder / f"kernels-{hashlib.sha256(' '.join(machine).encode()).hexdigest()[:16]}.json"


@functools.cache
def device_name(device: torch.device) -> str:
    """Return which hardware a device is: "cpu", its model and how many cores there are; else type and name."""
    if device.type != "cpu":
        return f"{device.type} {torch.get_device_module(device).get_device_name(device)}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"cpu {model or platform.processor()} {os.cpu_count()}"


def _read(path: Path) -> Mapping[str, Mapping[str, float]]:
    """Return the kept times; a file that cannot be read is one that was never written."""
    try:
        kept: dict[str, dict[str, float]] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept


def _write(path: Path, kept: Mapping[str, Mapping[str, float]]) -> None:
    try:
        make_folder(path.parent)
        write_atomically(path, json.dumps(kept, indent=1, sort_keys=True).encode())
    except OSError as error:
        logger.info("times of kernels are not kept: %s", error)
