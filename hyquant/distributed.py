"""A group of ranks, or one process alone: the same verbs either way.

A group is started by torchrun, whose environment variables say who is who. One process alone needs neither torchrun nor
torch.distributed. Ranks exchange configs, scores and statistics, not activations; these travel as JSON and safetensors
over gloo on the host, also where the model lives on an accelerator. Every verb is collective: all ranks call it, and
raises `RankLost` if one of them is gone or does not come.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from pydantic import JsonValue
from safetensors.torch import load, save
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from hyquant.calibration.packing import pack_stats, unpack_stats
from hyquant.calibration.stats import GroupStats, merge
from hyquant.calibration.store import Entry
from hyquant.devices.base import Device
from hyquant.errors import ConfigError, HyquantError, RankLost

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

DEFAULT_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Group:
    """The ranks that work on one trial.

    Attributes:
        rank: This process, from 0.
        world_size: Number of processes; with 1 every verb is local.
        local_rank: This process among those of its machine; picks its device.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            _all_gather_bytes(b"", self.world_size)

    def broadcast(self, value: JsonValue = None) -> JsonValue:
        """Return rank 0's value on every rank; other ranks' own is ignored. Tuples arrive as lists."""
        payload = _to_json(value if self.rank == 0 else None)
        return _from_json(payload if self.world_size == 1 else _broadcast_bytes(payload, is_source=self.rank == 0))

    def gather(self, value: JsonValue) -> list[JsonValue] | None:
        """Return the values of all ranks in rank order on rank 0, None elsewhere."""
        values = self.all_gather(value)
        return values if self.rank == 0 else None

    def all_gather(self, value: JsonValue) -> list[JsonValue]:
        """Return the values of all ranks, in rank order, on every rank."""
        return [_from_json(payload) for payload in self._exchange(_to_json(value))]

    def all_gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the named tensors of all ranks, in rank order and on the CPU, on every rank."""
        return [load(part) for part in self._exchange(_to_bytes(tensors))]

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]] | None:
        """Return the named tensors of all ranks, in rank order and on the CPU, on rank 0; None elsewhere.

        For what is large and needed in one place, such as videos.
        """
        payload = _to_bytes(tensors)
        parts = [payload] if self.world_size == 1 else _gather_bytes(payload, self.rank, self.world_size)
        return None if parts is None else [load(part) for part in parts]

    def gather_in_order(self, values: Sequence[JsonValue]) -> list[JsonValue]:
        """Return the results of all ranks for items that were cut by `shard`, in the order of the items."""
        parts = self.all_gather(list(values))
        return [value for part in parts if isinstance(part, list) for value in part]

    def close(self) -> None:
        """Leave the group; harmless for one process alone."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _exchange(self, payload: bytes) -> list[bytes]:
        return [payload] if self.world_size == 1 else _all_gather_bytes(payload, self.world_size)


def init_group(device: Device, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Group:
    """Join the group that torchrun's environment describes, or be one process alone.

    Args:
        device: Kind of device; an accelerator's own back end is made available for its tensors.
        timeout_s: How long a verb waits for the slowest rank before it raises.

    Raises:
        ConfigError: If the environment describes a group only in part.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given:
        return Group()
    if len(given) < len(names) or not all(value.isdecimal() for value in given.values()):
        raise ConfigError(f"a group needs numbers in {', '.join(names)}, but got {given}; start it with torchrun")
    group = Group(rank=int(given["RANK"]), world_size=int(given["WORLD_SIZE"]), local_rank=int(given["LOCAL_RANK"]))
    if group.world_size > 1:
        own = device.process_group_backend
        backend = "gloo" if own == "gloo" else f"cpu:gloo,{device.name}:{own}"
        dist.init_process_group(
            backend,
            store=_store_of_this_start(timeout_s),
            rank=group.rank,
            world_size=group.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    logger.info("group rank=%d world_size=%d", group.rank, group.world_size)
    return group


def _store_of_this_start(timeout_s: float) -> Store:
    """Return the store through which ranks find each other, without what an earlier start of the group left there.

    torchrun restarts a group on the store that it had before, in which the addresses of dead ranks still stand.
    """
    store = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout_s))))[0]
    return PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def shard(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """Return a rank's contiguous part of the items; parts differ in length by one at most and together are the items.

    Raises:
        ValueError: If the rank is not one of the group.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, {world_size}), but got {rank}")
    return list(items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size])


def run_together(group: Group, work: Callable[[], Result]) -> Result:
    """Do a rank's own part of the work, and raise on every rank if it cannot be done on one. Collective.

    Without it, ranks would wait for one that has given up.

    Args:
        group: The ranks.
        work: Called once; what it returns is returned.

    Raises:
        HyquantError: Whatever `work` raised here, or the first other rank's error of this family, of the same kind.
    """
    if group.world_size == 1:
        return work()
    try:
        result = work()
    except HyquantError as error:
        group.all_gather([type(error).__name__, str(error)])
        raise
    for rank, told in enumerate(group.all_gather(None)):
        if isinstance(told, list):
            kinds = {kind.__name__: kind for kind in HyquantError.__subclasses__()}
            raise kinds.get(str(told[0]), HyquantError)(f"rank {rank}: {told[1]}")
    return result


def merge_stats(stats: Mapping[str, GroupStats], group: Group) -> dict[str, GroupStats]:
    """Return statistics over the records of all ranks, equal on every rank; a rank without records gives none."""
    if group.world_size == 1:
        return dict(stats)
    merged: dict[str, GroupStats] = {}
    for tensors in group.all_gather_tensors(pack_stats(stats).tensors):
        for name, part in unpack_stats(Entry(tensors, {})).items():
            merged[name] = merge(merged[name], part) if name in merged else part
    return merged


def add_sums(sums: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Return the sums of all ranks' tensors by name, equal on every rank; all ranks give the same names and shapes."""
    if group.world_size == 1:
        return dict(sums)
    parts = group.all_gather_tensors(sums)
    return {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in sums}


def _to_json(value: JsonValue) -> bytes:
    return json.dumps(value).encode()


def _from_json(payload: bytes) -> JsonValue:
    value: JsonValue = json.loads(payload)
    return value


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    payload: bytes = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return payload


def _as_tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)


def _together(verb: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        verb(*args, **kwargs)
    except RuntimeError as error:  # gloo's word for a connection that was closed, and for a time-out
        raise RankLost(f"every rank of a group must live and answer, but one did not: {error}") from error


def _broadcast_bytes(payload: bytes, *, is_source: bool) -> bytes:
    size = torch.tensor([len(payload)])
    _together(dist.broadcast, size, src=0)
    buffer = _as_tensor(payload) if is_source else torch.empty(int(size), dtype=torch.uint8)
    _together(dist.broadcast, buffer, src=0)
    return buffer.numpy().tobytes()


def _all_gather_bytes(payload: bytes, world_size: int) -> list[bytes]:
    """Exchange byte strings of different lengths, padded to the longest."""
    sizes = _all_sizes(payload, world_size)
    longest = max(1, *sizes)
    buffers = [torch.empty(longest, dtype=torch.uint8) for _ in range(world_size)]
    _together(dist.all_gather, buffers, _padded(payload, longest))
    return [buffer[:size].numpy().tobytes() for buffer, size in zip(buffers, sizes, strict=True)]


def _gather_bytes(payload: bytes, rank: int, world_size: int) -> list[bytes] | None:
    """Bring byte strings of different lengths to rank 0, padded to the longest on the way."""
    sizes = _all_sizes(payload, world_size)
    longest = max(1, *sizes)
    buffers = [torch.empty(longest, dtype=torch.uint8) for _ in range(world_size)] if rank == 0 else None
    _together(dist.gather, _padded(payload, longest), buffers, dst=0)
    if buffers is None:
        return None
    return [buffer[:size].numpy().tobytes() for buffer, size in zip(buffers, sizes, strict=True)]


def _all_sizes(payload: bytes, world_size: int) -> list[int]:
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    _together(dist.all_gather, sizes, torch.tensor([len(payload)]))
    return [int(size) for size in sizes]


def _padded(payload: bytes, length: int) -> Tensor:
    return torch.nn.functional.pad(_as_tensor(payload), (0, length - len(payload)))
