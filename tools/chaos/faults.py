"""Faults as they are done to a running rack, and undone."""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from tools.chaos.network import cut, mend
from tools.chaos.plan import Fault
from tools.chaos.servers import Server, drain, fill
from tools.chaos.workers import Worker, send

Undo = Callable[[], None]


@dataclass
class Rack:
    """What faults are done to.

    Attributes:
        postgres: The study's database, and MLflow's.
        mlflow: The tracking server.
        workers: The commands under test.
        cuts: How many faults cut each host at the moment; a host is mended with the last of them.
        fills: The same for disks, by worker.
    """

    postgres: Server
    mlflow: Server
    workers: list[Worker]
    cuts: dict[str, int] = field(default_factory=dict)
    fills: dict[int, int] = field(default_factory=dict)


def begin(rack: Rack, fault: Fault) -> tuple[str, Undo]:
    """Do a fault to a rack; return its effect in words and what ends it."""
    return FAULTS[fault.kind](rack, fault)


def _nothing() -> None:
    pass


def _kill_one(processes: list[psutil.Process], fault: Fault, what: str) -> tuple[str, Undo]:
    if not processes:
        return f"no {what} was running", _nothing
    process = processes[int(fault.draw * len(processes))]
    send(process, signal.SIGKILL)
    return f"{what} {process.pid} killed", _nothing


def _kill_rank(rack: Rack, fault: Fault) -> tuple[str, Undo]:
    return _kill_one(rack.workers[fault.worker].ranks(), fault, "rank")


def _kill_agent(rack: Rack, fault: Fault) -> tuple[str, Undo]:
    return _kill_one(rack.workers[fault.worker].agents(), fault, "agent")


def _kill_command(rack: Rack, fault: Fault) -> tuple[str, Undo]:
    return _kill_one(rack.workers[fault.worker].tree()[:1], fault, "command")


def _kill_all_workers(rack: Rack, fault: Fault) -> tuple[str, Undo]:
    return f"{sum(worker.kill_tree() for worker in rack.workers)} processes killed", _nothing


def _kill_everything(rack: Rack, fault: Fault) -> tuple[str, Undo]:
    rack.postgres.kill()
    rack.mlflow.kill()
    number = sum(worker.kill_tree() for worker in rack.workers)

    def undo() -> None:
        _start_again(rack.postgres)
        _start_again(rack.mlflow)

    return f"PostgreSQL, MLflow and {number} processes killed", undo


def _hang(rack: Rack, fault: Fault) -> tuple[str, Undo]:
    stopped = [process for process in rack.workers[fault.worker].ranks() if send(process, signal.SIGSTOP)]

    def undo() -> None:
        for process in stopped:
            send(process, signal.SIGCONT)

    return f"{len(stopped)} ranks stopped", undo


def _cut(rack: Rack, fault: Fault) -> tuple[str, Undo]:
    host = fault.host
    rack.cuts[host] = rack.cuts.get(host, 0) + 1
    cut(host)

    def undo() -> None:
        rack.cuts[host] -= 1
        if not rack.cuts[host]:
            mend(host)

    return f"{host} cut off", undo


def _kill_server(server: Server) -> tuple[str, Undo]:
    server.kill()
    return f"{server.name} killed", lambda: _start_again(server)


def _start_again(server: Server) -> None:
    """Start a server unless another fault's end has done so."""
    if server.process is None or server.process.poll() is not None:
        server.start()


def _fill_disk(rack: Rack, fault: Fault) -> tuple[str, Undo]:
    index, worker = fault.worker, rack.workers[fault.worker]
    rack.fills[index] = rack.fills.get(index, 0) + 1
    num_bytes = fill(worker.store)

    def undo() -> None:
        rack.fills[index] -= 1
        if not rack.fills[index]:
            drain(worker.store)

    return f"disk of {worker.name} filled with {num_bytes >> 20} MiB", undo


def _damage_cache(rack: Rack, fault: Fault) -> tuple[str, Undo]:
    worker = rack.workers[fault.worker]
    files = sorted(path for path in (worker.store / "cache").rglob("*") if path.is_file() and path.stat().st_size)
    if not files:
        return f"the cache of {worker.name} is empty", _nothing
    path = files[int(fault.draw * len(files))]
    data = bytearray(path.read_bytes())
    position = int(fault.draw * len(data))
    data[position] ^= 0xFF
    path.write_bytes(bytes(data))
    return f"byte {position} of {path.relative_to(worker.store)} turned over", _nothing


FAULTS: dict[str, Callable[[Rack, Fault], tuple[str, Undo]]] = {
    "kill rank": _kill_rank,
    "kill agent": _kill_agent,
    "kill command": _kill_command,
    "kill all workers": _kill_all_workers,
    "kill everything": _kill_everything,
    "hang rank": _hang,
    "hang rank past lease": _hang,
    "cut network": _cut,
    "cut network past lease": _cut,
    "kill postgres": lambda rack, fault: _kill_server(rack.postgres),
    "postgres away": lambda rack, fault: _kill_server(rack.postgres),
    "kill mlflow": lambda rack, fault: _kill_server(rack.mlflow),
    "fill disk": _fill_disk,
    "damage cache": _damage_cache,
}
