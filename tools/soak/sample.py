"""What a run's processes hold at one moment, by role: memory, handles, threads; and what its folders take on disk.

run      the command itself, which watches        agent    torchrun's, one a slot
worker   the ranks, which load the model          other    what these start, compilers above all
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import psutil

from hyquant.config import FrozenModel

Role = Literal["run", "agent", "worker", "other"]
WATCHED: tuple[Role, ...] = ("run", "agent", "worker")


class Held(FrozenModel):
    """What the processes of a role hold together; `pids` tell a restarted one from the one before."""

    pids: tuple[int, ...]
    rss_bytes: int
    pss_bytes: int
    handles: int
    threads: int


class Sample(FrozenModel):
    """One moment, `at_s` seconds after the start; `disk_bytes` by part of a folder, such as "store/cache"."""

    at_s: float
    roles: dict[Role, Held]
    disk_bytes: dict[str, int]


def taken(run: psutil.Process, at_s: float, folders: Mapping[str, Path]) -> Sample:
    """Look at a run's processes and at the parts of folders."""
    found: dict[Role, Held] = {}
    for process in [run, *run.children(recursive=True)]:
        try:
            role, held = _role(process, run), _held(process)
        except psutil.Error:  # it has just ended
            continue
        found[role] = held if role not in found else _together(found[role], held)
    disk = {f"{name}/{part}": size for name, folder in folders.items() for part, size in _parts(folder)}
    return Sample(at_s=at_s, roles=found, disk_bytes=disk)


def _role(process: psutil.Process, run: psutil.Process) -> Role:
    if process == run:
        return "run"
    command = process.cmdline()
    if "search.agent" in command:
        return "agent"
    return "worker" if "search.worker" in command else "other"


def _held(process: psutil.Process) -> Held:
    with process.oneshot():
        memory = process.memory_full_info()
        return Held(
            pids=(process.pid,),
            rss_bytes=memory.rss,
            pss_bytes=memory.pss,
            handles=process.num_fds(),
            threads=process.num_threads(),
        )


def _together(one: Held, other: Held) -> Held:
    return Held(
        pids=(*one.pids, *other.pids),
        rss_bytes=one.rss_bytes + other.rss_bytes,
        pss_bytes=one.pss_bytes + other.pss_bytes,
        handles=one.handles + other.handles,
        threads=one.threads + other.threads,
    )


def _parts(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield folders and files of a folder with their sizes in bytes, without what a database has beside it."""
    for part in sorted(folder.iterdir()) if folder.exists() else ():
        files = part.rglob("*") if part.is_dir() else (part,)
        if not part.name.endswith(("-wal", "-shm", "-journal")):
            yield part.name, sum(map(_size, files))


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # written and removed between two looks
        return 0
