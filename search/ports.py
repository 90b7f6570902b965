"""Blocks of ports for HCCL: one per live slot, on this host, whoever runs it.

torchrun needs none of them: the kernel picks MASTER_PORT, which listens from then on (`search.rendezvous`). HCCL
however starts from fixed ports, 60000 on the host and 16666 on the card, where two groups on one host meet. A block is
claimed by a lock on a file, which the kernel releases when its owner dies, and lies outside of the ports that the
kernel hands out by itself. Whoever sets one of the variables gets none of ours: our range would go before their port.

    HCCL_IF_BASE_PORT           first port of the block
    HCCL_HOST_SOCKET_PORT_RANGE first half of the block; goes before HCCL_IF_BASE_PORT where HCCL knows it
    HCCL_NPU_SOCKET_PORT_RANGE  second half of the block, ports of the cards

Source: CANN's reference of HCCL variables (hiascend.com, envref_07_0143 and envref_07_0144): a range needs at least as
many ports as processes on a card, and every rank of a group must have it.
"""

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from search.errors import SearchError
from search.locks import FileLock, default_lock_folder

VARIABLES = ("HCCL_IF_BASE_PORT", "HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE")
BLOCK_SIZE = 64
_FIRST, _LAST = 20_000, 65_535
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True)
class PortBlock:
    """`BLOCK_SIZE` consecutive ports from `first`."""

    first: int

    @property
    def environment(self) -> dict[str, str]:
        """Return what tells HCCL of the block."""
        middle, end = self.first + BLOCK_SIZE // 2, self.first + BLOCK_SIZE
        return dict(zip(VARIABLES, (str(self.first), f"{self.first}-{middle - 1}", f"{middle}-{end - 1}"), strict=True))


def claim_block(folder: Path | None = None) -> tuple[PortBlock, FileLock]:
    """Claim a block that nobody holds and none of whose ports is in use, until its lock is released or its owners end.

    Args:
        folder: Where the locks are; None is this host's.

    Raises:
        SearchError: If there is none.
        StoreError: If a lock file cannot be made.
    """
    folder = default_lock_folder() if folder is None else folder
    for first in _firsts(*_ephemeral_range()):
        lock = FileLock(folder / f"ports-{first}.lock")
        if lock.acquire(blocking=False):
            if all(map(_is_free, range(first, first + BLOCK_SIZE))):
                return PortBlock(first), lock
            lock.release()
    raise SearchError(
        f"a slot of NPUs needs {BLOCK_SIZE} free ports in a row between {_FIRST} and {_LAST}, but none are left; stop "
        "other studies on this host, or set HCCL_IF_BASE_PORT"
    )


def _firsts(low: int, high: int) -> Iterator[int]:
    """Yield first ports of blocks, those that do not touch the ports `low` to `high` before all others."""
    blocks = range(_FIRST, _LAST + 2 - BLOCK_SIZE, BLOCK_SIZE)
    yield from (first for first in blocks if first > high or first + BLOCK_SIZE <= low)
    yield from (first for first in blocks if first <= high and first + BLOCK_SIZE > low)


def _ephemeral_range() -> tuple[int, int]:
    """Return the ports that the kernel hands out; Linux's usual ones where it does not tell."""
    try:
        low, high = map(int, _EPHEMERAL.read_text().split())
    except (OSError, ValueError):
        return 32_768, 60_999
    return low, high


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
