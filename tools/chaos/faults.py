"""Faults as they are done to a running rack, and undone."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from tools.chaos.network import cut, mend
from tools.chaos.plan import Fault
from tools.chaos.servers import Server, drain, fill
from tools.chaos.workers import Worker, send

Undo = Callable[[], None]
Begun = tuple[str, Undo]
"""The effect of a fault in words, and what ends it."""


@dataclass
class Rack:
    """What faults are done to.

    Attributes:
        postgres: The study's database, and MLflow's.
        mlflow: The tracking server.
        workers: The commands under test.
        busy: Returns the process ids of the ranks that have a trial in hand.
        cuts: Hosts that are cut off at the moment.
        fills: Workers whose disks are full at the moment.
    """

    postgres: Server
    mlflow: Server
    workers: list[Worker]
    busy: Callable[[], frozenset[int]]
    cuts: set[str] = field(default_factory=set)
    fills: set[str] = field(default_factory=set)

    def at_work(self, fault: Fault) -> list[Worker]:
        """Return the workers that have a trial in hand, the one that a fault is meant for first."""
        busy, index = self.busy(), fault.worker
        order = self.workers[index:] + self.workers[:index]
        return [worker for worker in order if any(rank.pid in busy for rank in worker.ranks())]


def begin(rack: Rack, fault: Fault) -> Begun | None:
    """Do a fault to a rack; None if there is nothing to do it to at the moment."""
    return FAULTS[fault.kind](rack, fault)


def _nothing() -> None:
    pass


def _kill_one(rack: Rack, fault: Fault, what: str, among: Callable[[Worker], list[psutil.Process]]) -> Begun | None:
    for worker in rack.at_work(fault):
        if processes := among(worker):
            process = processes[int(fault.draw * len(processes))]
            if send(process, signal.SIGKILL):
                return f"{what} {process.pid} of {worker.name} killed", _nothing
    return None


def _kill_rank(rack: Rack, fault: Fault) -> Begun | None:
    return _kill_one(rack, fault, "rank", Worker.ranks)


def _kill_agent(rack: Rack, fault: Fault) -> Begun | None:
    return _kill_one(rack, fault, "agent", Worker.agents)


def _kill_command(rack: Rack, fault: Fault) -> Begun | None:
    return _kill_one(rack, fault, "command", lambda worker: worker.tree()[:1])


def _kill_all_workers(rack: Rack, fault: Fault) -> Begun | None:
    if not rack.at_work(fault):
        return None
    return f"{sum(worker.kill_tree() for worker in rack.workers)} processes killed", _nothing


def _kill_everything(rack: Rack, fault: Fault) -> Begun | None:
    if not rack.at_work(fault):
        return None
    rack.postgres.kill()
    rack.mlflow.kill()
    number = sum(worker.kill_tree() for worker in rack.workers)

    def undo() -> None:
        _start_again(rack.postgres)
        _start_again(rack.mlflow)

    return f"PostgreSQL, MLflow and {number} processes killed", undo


def _hang(rack: Rack, fault: Fault) -> Begun | None:
    for worker in rack.at_work(fault):
        if stopped := [process for process in worker.ranks() if send(process, signal.SIGSTOP)]:
            return f"{len(stopped)} ranks of {worker.name} stopped", lambda: _wake(stopped)
    return None


def _wake(stopped: Sequence[psutil.Process]) -> None:
    for process in stopped:
        send(process, signal.SIGCONT)


def _cut(rack: Rack, fault: Fault) -> Begun | None:
    hosts = [worker.host for worker in rack.at_work(fault) if worker.host not in rack.cuts]
    if not hosts:
        return None
    host = hosts[0]
    rack.cuts.add(host)
    cut(host)

    def undo() -> None:
        rack.cuts.remove(host)
        mend(host)

    return f"{host} cut off", undo


def _kill_server(rack: Rack, fault: Fault, server: Server) -> Begun | None:
    if not server.is_running or not rack.at_work(fault):
        return None
    server.kill()
    return f"{server.name} killed", lambda: _start_again(server)


def _start_again(server: Server) -> None:
    """Start a server unless another fault's end has done so."""
    if not server.is_running:
        server.start()


def _fill_disk(rack: Rack, fault: Fault) -> Begun | None:
    workers = [worker for worker in rack.at_work(fault) if worker.name not in rack.fills]
    if not workers:
        return None
    worker = workers[0]
    rack.fills.add(worker.name)
    num_bytes = fill(worker.store)

    def undo() -> None:
        rack.fills.remove(worker.name)
        drain(worker.store)

    return f"disk of {worker.name} filled with {num_bytes >> 20} MiB", undo


def _damage_cache(rack: Rack, fault: Fault) -> Begun | None:
    for worker in rack.at_work(fault):
        if files := sorted(one for one in (worker.store / "cache").rglob("*") if one.is_file() and one.stat().st_size):
            path = files[int(fault.draw * len(files))]
            data = bytearray(path.read_bytes())
            position = int(fault.draw * len(data))
            data[position] ^= 0xFF
            path.write_bytes(bytes(data))
            return f"byte {position} of {path.relative_to(worker.store)} of {worker.name} turned over", _nothing
    return None


FAULTS: dict[str, Callable[[Rack, Fault], Begun | None]] = {
    "kill rank": _kill_rank,
    "kill agent": _kill_agent,
    "kill command": _kill_command,
    "kill all workers": _kill_all_workers,
    "kill everything": _kill_everything,
    "hang rank": _hang,
    "hang rank past lease": _hang,
    "cut network": _cut,
    "cut network past lease": _cut,
    "kill postgres": lambda rack, fault: _kill_server(rack, fault, rack.postgres),
    "postgres away": lambda rack, fault: _kill_server(rack, fault, rack.postgres),
    "kill mlflow": lambda rack, fault: _kill_server(rack, fault, rack.mlflow),
    "fill disk": _fill_disk,
    "damage cache": _damage_cache,
}
