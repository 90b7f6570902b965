"""What a slot holds on this host while it lives: devices, a block of ports, and the locks that say so."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType

from hyquant.devices import resolve_device
from search.device_cards import cards
from search.errors import SearchError
from search.locks import FileLock
from search.order import WorkOrder
from search.ports import VARIABLES, claim_block
from search.slot_devices import assign_devices, claim_devices, devices_here
from search.study import Slot

NPU_DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "TASK_QUEUE_ENABLE": "2",
        "CPU_AFFINITY_CONF": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ALGO": "0",
    }
)
"""Environment of an Ascend slot, as the example of HunyuanVideo in MindIE is started."""


@dataclass(frozen=True)
class Claim:
    """A slot with what it holds.

    Attributes:
        slot: The slot.
        devices: Its devices; None for all that are visible.
        variable: The variable that names them to its ranks; None on the CPU.
        defaults: Environment of its ranks where the user sets nothing.
        locks: What keeps others off.
    """

    slot: Slot
    devices: tuple[str, ...] | None = None
    variable: str | None = None
    defaults: Mapping[str, str] = field(default_factory=dict)
    locks: tuple[FileLock, ...] = ()

    @property
    def cores(self) -> tuple[int, ...]:
        """Return the cores that its ranks are kept to; none for no limit."""
        return tuple(map(int, self.devices)) if self.devices is not None and self.variable is None else ()

    def release(self) -> None:
        """Let go of the locks in this process; a process that inherited them still holds them."""
        for lock in self.locks:
            lock.release()


def claimed(slots: Sequence[Slot], order: WorkOrder, *, device: str) -> list[Claim]:
    """Claim what slots need: all of it, or nothing.

    Raises:
        SearchError: If devices or ports are not there, or held by another slot, or several ranks would share a device.
        DeviceUnavailable: If slots name devices of a kind that does not work here.
    """
    if ":" in device and any(slot.ranks > 1 for slot in slots):
        raise SearchError(
            f"each rank of a slot needs a device of its own, but model.device is {device!r} and a slot has "
            f"{max(slot.ranks for slot in slots)} ranks; leave the index out"
        )
    if all(slot.devices is None for slot in slots) and not device.startswith(("npu", "auto")):
        return [Claim(slot) for slot in slots]
    kind = resolve_device(device)
    here = devices_here(kind, os.environ)
    are_cores = kind.visible_devices_env is None
    assigned = assign_devices([(slot.ranks, slot.devices) for slot in slots], here, are_cores=are_cores)
    named = [name for devices in assigned for name in devices or ()]
    cards_here = cards(named, kind=kind.name, environment=os.environ)
    with ExitStack() as on_error:
        found = []
        for index, (slot, devices) in enumerate(zip(slots, assigned, strict=True)):
            holder = f"slot {index} of study {order.study}, pid {os.getpid()}"
            locks = claim_devices(devices or (), kind=kind.name, cards=cards_here, holder=holder)
            for lock in locks:
                on_error.callback(lock.release)
            defaults: dict[str, str] = {}
            if kind.name == "npu":
                defaults = dict(NPU_DEFAULTS)
                if not {*os.environ, *slot.environment} & set(VARIABLES):
                    block, lock = claim_block()
                    on_error.callback(lock.release)
                    locks.append(lock)
                    defaults |= block.environment
            found.append(Claim(slot, devices, kind.visible_devices_env, defaults, tuple(locks)))
        on_error.pop_all()
    return found
