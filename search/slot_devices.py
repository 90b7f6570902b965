"""Which devices a slot has: text to lists, lists cut from what this host has, and a claim that other studies respect.

A device is what the variable of visible devices calls it, "0" for example; on the CPU it is a core. `AUTO` devices are
cut in order from those that no other slot names: one for each rank, and on the CPU an equal share of the cores.
"""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType

from hyquant.devices import resolve_device
from hyquant.devices.base import Device
from search.errors import SearchError
from search.locks import FileLock, default_lock_folder

AUTO = "auto"
_NO_CARDS: Mapping[str, str] = MappingProxyType({})
_LAYOUT = re.compile(r"\s*(\d{1,4})\s*[x×]\s*(\d{1,4})\s*")


def read_devices(text: str) -> tuple[str, ...]:
    """Return the devices of a list such as "0-3,6".

    Raises:
        ValueError: If it is no such list, or names a device twice.
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if bounds := re.fullmatch(r"(\d{1,4})-(\d{1,4})", part):
            found += map(str, range(int(bounds[1]), int(bounds[2]) + 1))
        elif re.fullmatch(r"\d{1,4}|[A-Za-z][\w:./-]*", part):
            found.append(part.lstrip("0") or "0" if part.isdecimal() else part)
        else:
            found = []
            break
    if not found or len(set(found)) < len(found):
        raise ValueError(f'devices must be a list of different devices such as "0-3,6", but got {text!r}; correct it')
    return tuple(found)


def read_layout(text: str) -> list[dict[str, object]]:
    """Return the slots that a layout such as "2 x 4" means: 2 slots of 4 ranks.

    Raises:
        ValueError: If it is no layout.
    """
    match = _LAYOUT.fullmatch(text)
    num_slots, ranks = (int(match[1]), int(match[2])) if match else (0, 0)
    if num_slots < 1 or ranks < 1:
        raise ValueError(f'slots must be a list, or SLOTS x RANKS such as "2 x 4", but got {text!r}; correct it')
    return [{"ranks": ranks, "devices": AUTO} for _ in range(num_slots)]


def devices_here(device: Device, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the devices that this process may use, in order.

    Raises:
        SearchError: If the variable that names them does not hold a list.
    """
    variable = device.visible_devices_env
    if variable is None:
        return tuple(map(str, cores_here()))
    if listed := environment.get(variable, "").strip():
        return _read_visible(listed, variable)
    return tuple(map(str, range(device.num_devices())))


def _read_visible(listed: str, variable: str) -> tuple[str, ...]:
    """Return the devices that a variable names, up to -1.

    Source: CUDA C++ programming guide, environment variables: what stands behind an invalid index is invisible.
    """
    names = list(takewhile(lambda name: name != "-1", (name.strip() for name in listed.split(","))))
    try:
        return read_devices(",".join(names)) if names else ()
    except ValueError as error:
        raise SearchError(
            f"{variable} must name different devices, such as 0,1, but is {listed!r}; correct it"
        ) from error


def count_devices(name: str) -> int:
    """Return how many devices of a study's kind this process may use."""
    return len(devices_here(resolve_device(name), os.environ))


def cores_here() -> tuple[int, ...]:
    """Return the cores that this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def assign_devices(
    wanted: Sequence[tuple[int, str | None]], here: Sequence[str], *, are_cores: bool
) -> list[tuple[str, ...] | None]:
    """Return the devices of every slot; None for one that says nothing about devices.

    Args:
        wanted: Ranks and device list of every slot; the list may be `AUTO`.
        here: Devices there are.
        are_cores: A rank may have more than one device.

    Raises:
        SearchError: If there are fewer devices than wanted, or one is named that is not there.
    """
    named = [None if text in (None, AUTO) else read_devices(text) for _, text in wanted]
    taken = {name for names in named if names for name in names}
    if missing := sorted(taken - set(here)):
        raise SearchError(
            f"slots must name devices of this host ({', '.join(here) or 'none'}), but name {', '.join(missing)}; "
            "correct slots"
        )
    free = [name for name in here if name not in taken]
    num_ranks = sum(ranks for ranks, text in wanted if text == AUTO)
    if num_ranks > len(free):
        raise SearchError(f"slots need {num_ranks} devices, one for each rank, but {len(free)} are free; take fewer")
    share = len(free) // num_ranks if are_cores and num_ranks else 1
    found: list[tuple[str, ...] | None] = []
    for (ranks, text), names in zip(wanted, named, strict=True):
        if text == AUTO:
            names, free = tuple(free[: ranks * share]), free[ranks * share :]
        found.append(names)
    return found


def claim_devices(
    devices: Sequence[str], *, kind: str, holder: str, cards: Mapping[str, str] = _NO_CARDS, folder: Path | None = None
) -> list[FileLock]:
    """Claim devices for one slot until the locks are released or their owners end.

    Args:
        devices: Names of devices.
        kind: Their kind, "npu" for example.
        holder: Who claims them; told to those who are refused.
        cards: What devices are called in every container (`search.device_cards`), by name; others go by their name.
        folder: Where the locks are; None is this host's.

    Raises:
        SearchError: If somebody else holds one; it says who.
        StoreError: If a lock file cannot be made.
    """
    folder = default_lock_folder() if folder is None else folder
    locks: list[FileLock] = []
    for name in devices:
        lock = FileLock(folder / f"{kind}-{re.sub(r'[^A-Za-z0-9-]', '_', cards.get(name, name))}.lock")
        if not lock.acquire(blocking=False):
            owner = lock.path.read_text(encoding="utf-8").strip() or "another process"
            for held in locks:
                held.release()
            raise SearchError(
                f"a device works for one slot at a time, but {kind} {name} is held by {owner}; name another one or wait"
            )
        lock.path.write_text(holder, encoding="utf-8")
        locks.append(lock)
    return locks
