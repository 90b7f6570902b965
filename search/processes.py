"""Who works on a trial: a process of a host, and whether it is still alive.

A process id alone is not enough, because ids are used again; the start time of the process tells two of them apart.
"""

import os
import socket
import threading
import time
from pathlib import Path

from hyquant.config import FrozenModel

_WATCH_INTERVAL_S = 0.5


class WorkerId(FrozenModel):
    """The process that runs a trial; stored in the trial's user attribute "worker".

    `started` is the kernel's start time of the process in clock ticks since boot, "" where the kernel does not tell.
    """

    host: str
    pid: int
    started: str
    slot: int


def this_worker(slot: int) -> WorkerId:
    """Return the identity of this process."""
    return WorkerId(host=socket.gethostname(), pid=os.getpid(), started=_start_time(os.getpid()), slot=slot)


def is_local(worker: WorkerId) -> bool:
    """Say whether a worker belongs to this host."""
    return worker.host == socket.gethostname()


def is_alive(worker: WorkerId) -> bool:
    """Say whether a worker of this host still runs."""
    try:
        os.kill(worker.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _start_time(worker.pid) == worker.started


def exit_with_parent(parent_pid: int) -> None:
    """Watch in a daemon thread whether the parent process still is `parent_pid`; end this process at once if not.

    A worker whose agent was killed has nobody left who would stop it.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(_WATCH_INTERVAL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _start_time(pid: int) -> str:
    """Return field 22 of /proc/PID/stat, "" where there is none.

    Source: proc_pid_stat(5); the second field is the command in parentheses and may hold spaces. A zombie counts as
        ended.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "ended" if fields[0] == "Z" else fields[19]
