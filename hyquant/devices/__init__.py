"""Kinds of devices by name: the table `DEVICES`, entry points of the group "hyq.devices", and how one is chosen."""

import os
from collections.abc import Mapping

import torch

from hyquant.devices.base import Device
from hyquant.devices.cpu import CpuDevice
from hyquant.devices.cuda import CudaDevice
from hyquant.devices.npu import NpuDevice
from hyquant.errors import ConfigError, DeviceUnavailable
from hyquant.plugins import find_entry

ENTRY_POINT_GROUP = "hyq.devices"

DEVICES: Mapping[str, Device] = {"npu": NpuDevice(), "cuda": CudaDevice(), "cpu": CpuDevice()}
"""In the order in which "auto" tries them."""


def resolve_device(name: str | torch.device) -> Device:
    """Return the kind of device that a name such as "auto", "cpu" or "npu:1" means, ready to use.

    "auto" is the first of npu, cuda and cpu that is available.

    Raises:
        ConfigError: If nobody offers a device of this name.
        DeviceUnavailable: If it is known but not usable on this machine.
    """
    kind = str(name).partition(":")[0]
    if kind == "auto":
        return next(device for device in DEVICES.values() if device.is_available())
    device = find_entry(DEVICES, ENTRY_POINT_GROUP, kind)
    device.require()
    return device


def resolve_torch_device(name: str | torch.device) -> torch.device:
    """Return the torch device that a name means; without an index, that of this process's LOCAL_RANK, else the first.

    Raises:
        ConfigError: If the name or its index are malformed.
        DeviceUnavailable: If the device is not usable on this machine, or there are fewer of its kind.
    """
    index = str(name).partition(":")[2] or os.environ.get("LOCAL_RANK", "0")
    if not index.isdecimal():
        raise ConfigError(f"a device is a name and perhaps an index, such as npu:1, but got {str(name)!r}")
    device = resolve_device(name)
    found = device.torch_device(int(index))
    if found.index is not None and found.index >= (count := device.num_devices()):
        raise DeviceUnavailable(
            f"a device's index must be below the number of visible devices, but {found} is asked for and {count} "
            f"{'is' if count == 1 else 'are'} visible; start fewer ranks, or name another"
        )
    return found
