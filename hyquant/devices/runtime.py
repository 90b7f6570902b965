"""Which runtime lies between torch and a device."""

from importlib.metadata import PackageNotFoundError, version

import torch


def runtime_versions(device: torch.device) -> dict[str, str]:
    """Return the version of CUDA that torch was built with, or of torch_npu; nothing for other devices.

    The driver is not among them: torch does not tell it.
    """
    if device.type == "cuda":
        return {"cuda": torch.version.cuda or "unknown"}
    if device.type == "npu":
        try:
            return {"torch_npu": version("torch_npu")}
        except PackageNotFoundError:
            return {"torch_npu": "unknown"}
    return {}
