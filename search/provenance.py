"""Where a result comes from: code, packages, device, driver, environment, seed and digests, as one small frozen value.

It is kept with every trial's result, so that whoever repeats the trial can say what was different.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from hyquant.config import FrozenModel
from hyquant.software import software_versions
from search.redaction import names_a_secret, redacted

if TYPE_CHECKING:
    import torch

PACKAGES = ("optuna", "mlflow", "numpy", "transformers", "open_clip_torch")
"""What shapes scores and the search, beside what shapes videos (`hyquant.software`)."""

PREFIXES = ("HCCL_", "NCCL_", "OMP_", "MKL_", "ASCEND_", "CUDA_", "PYTORCH_", "TORCH_", "TASK_QUEUE_", "CPU_AFFINITY_")
"""Variables that change how devices and collectives work."""

SET_BY_TORCHRUN = {"TORCH_NCCL_ASYNC_ERROR_HANDLING"}
"""Of these, what every slot has and no process outside of one; it says nothing about a result."""

DRIVER_FILES: Mapping[str, Path] = {
    "nvidia driver": Path("/proc/driver/nvidia/version"),
    "ascend driver": Path("/usr/local/Ascend/driver/version.info"),
    "cann": Path("/usr/local/Ascend/ascend-toolkit/latest/version.cfg"),
}
_ROOT = Path(__file__).parent.parent


class Provenance(FrozenModel):
    """What a result rests on.

    Attributes:
        code: Git commit, with "+" for changed files; "" where the package is not a clone.
        packages: Versions by package.
        device: Kind of device.
        drivers: First line of what each driver says of itself, by name; those that are not there are left out.
        environment: Variables that devices and collectives listen to, as they were set.
        seed: Seed of the workload.
        ranks: How many processes shared the work; None in results of old.
        digests: Of the model ("model"), the prompts, the config, and the key of the calibration statistics.
    """

    code: str
    packages: dict[str, str]
    device: str
    drivers: dict[str, str]
    environment: dict[str, str]
    seed: int
    ranks: int | None = None
    digests: dict[str, str]

    def flat(self) -> dict[str, str]:
        """Return all of it as texts by name."""
        digests = {f"{name} digest": value for name, value in self.digests.items()}
        own = {"code": self.code or "unknown", "device": self.device, "seed": str(self.seed)}
        ranks = {} if self.ranks is None else {"ranks": str(self.ranks)}
        return {**own, **ranks, **self.packages, **self.drivers, **self.environment, **digests}


def provenance_here(device: "torch.device", *, seed: int, ranks: int, digests: Mapping[str, str]) -> Provenance:
    """Describe a result of this process."""
    from hyquant.devices.runtime import runtime_versions  # loads torch, which reading a stored value does not need
    from hyquant.latency import describe_device

    return Provenance(
        code=code_version(_ROOT),
        packages={**software_versions(), **runtime_versions(device), **_installed(PACKAGES)},
        device=describe_device(device),
        drivers=driver_versions(DRIVER_FILES),
        environment=chosen_environment(os.environ),
        seed=seed,
        ranks=ranks,
        digests=dict(digests),
    )


def differences(before: Provenance, after: Provenance) -> tuple[str, ...]:
    """Say what differs, as "torch 2.9.0 -> 2.10.0"; which ports and devices a slot was given does not count."""
    old, new = before.flat(), after.flat()
    return tuple(
        f"{name} {old.get(name, 'none')} -> {new.get(name, 'none')}"
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name) and not name.endswith(("_VISIBLE_DEVICES", "_PORT", "_PORT_RANGE"))
    )


@cache
def code_version(folder: Path) -> str:
    """Return the commit that is checked out in a folder, with "+" if tracked files were changed; "" without a clone."""
    if not (folder / ".git").exists():
        return ""
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        return commit + "+" * bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return ""


def driver_versions(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the first line of each version file that is there."""
    found = {}
    for name, path in files.items():
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        found[name] = lines[0].strip() if lines else ""
    return found


def chosen_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that devices and collectives listen to; passwords in them, and what is one, are left out."""
    named = {name for name in environment if name.startswith(PREFIXES)} - SET_BY_TORCHRUN
    return {name: redacted(environment[name]) for name in sorted(named) if not names_a_secret(name)}


def _installed(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=30)
    return done.stdout
