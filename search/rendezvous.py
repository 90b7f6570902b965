"""torchrun's rendezvous of a slot, registered under `NAME`: one agent on one host has nobody to meet.

torchrun's own keeps its state behind a TCP port that listens on every address, and unpickles what it finds there. Here
that state is in memory. The ranks find each other at MASTER_ADDR and MASTER_PORT as ever, but that store listens on
loopback alone; it holds addresses, as bytes and numbers.
"""

import socket
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

NAME = "one-host"
LOOPBACK = "127.0.0.1"
_TIMEOUT = timedelta(seconds=60)


class OneHost(RendezvousHandler):
    """A rendezvous that is complete as soon as its only agent asks for it.

    Args:
        run_id: What torchrun calls the group.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._ranks: TCPStore | None = None

    def get_backend(self) -> str:
        """Return its name."""
        return NAME

    @property
    def use_agent_store(self) -> bool:
        """Tell ranks that the store at MASTER_PORT is there already, so that none of them makes one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return fresh stores: every start of the ranks has its own, in which nothing is left of an earlier one."""
        self._ranks = _loopback_store()
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, self._ranks.port))

    def is_closed(self) -> bool:
        """Say that the group may always be started again."""
        return False

    def set_closed(self) -> None:
        """Do nothing: no other agent would hear of it."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no other agent ever comes."""
        return 0

    def get_run_id(self) -> str:
        """Return what torchrun calls the group."""
        return self._run_id

    def shutdown(self) -> bool:
        """Let go of the ranks' store."""
        self._ranks = None
        return True


def register() -> None:
    """Make torchrun in this process know the rendezvous."""

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        return OneHost(parameters.run_id)

    rendezvous_handler_registry.register(NAME, create)


def _loopback_store() -> TCPStore:
    """Return a store that serves a free port of loopback: torch's own socket would listen on every address."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port = listener.getsockname()[1]
        return TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=_TIMEOUT,
            master_listen_fd=listener.detach(),
        )
