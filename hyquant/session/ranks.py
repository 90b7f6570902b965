"""Who this process is among the ranks of a run, and the names of files that each rank has for itself."""

import os

from torch import distributed as dist

from hyquant.distributed import Group
from hyquant.errors import ConfigError


def get_rank() -> int:
    """Return this process's rank, -1 if torch.distributed is not initialized."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else -1


def get_rank_suffix_file(base_name: str, ext: str, is_distributed: bool, rank: int) -> str:
    """Return a file name: `BASE_RANK.EXT` in a distributed run, else `BASE.EXT`.

    Raises:
        ConfigError: If a distributed run's rank is negative.
    """
    if is_distributed and rank < 0:
        raise ConfigError(f"the rank of a distributed run must be 0 or more, but got {rank}; give get_rank().")
    return f"{base_name}_{rank}.{ext}" if is_distributed else f"{base_name}.{ext}"


def current_group() -> Group:
    """Return the ranks that torch.distributed knows, or this process alone.

    Raises:
        ConfigError: If its back end takes no tensors on the host, by which ranks agree.
    """
    if get_rank() < 0 or dist.get_world_size() == 1:
        return Group()
    backends = str(dist.get_backend_config())
    if "cpu:" not in backends:
        raise ConfigError(
            f"ranks must have a back end for the host, but torch.distributed was initialized with {backends}; "
            "initialize it with one more, such as 'cpu:gloo,npu:hccl'."
        )
    rank = dist.get_rank()
    return Group(rank=rank, world_size=dist.get_world_size(), local_rank=int(os.environ.get("LOCAL_RANK", rank)))
