"""Who works on a trial: a process of a host, and whether it is still alive.

A process id alone is not enough, because ids are used again; the start time of the process tells two of them apart.
"""

import os
import signal
import socket
import threading
import time
from pathlib import Path

from hyquant.config import FrozenModel, digest
from search.parent import send_when_parent_ends

_WATCH_INTERVAL_S = 0.5


class ProcessId(FrozenModel):
    """One process of a host.

    `started` is the kernel's start time of the process in clock ticks since boot, "" where the kernel does not tell.
    """

    pid: int
    started: str


class WorkerId(ProcessId):
    """The process that runs a trial; stored in the trial's user attribute "worker".

    `kernel` tells two hosts or containers of one name apart. `crew` is the joined worker it belongs to, "" for `run`.
    `runner` is the process of that `run` or `worker`.
    """

    host: str
    slot: int
    kernel: str = ""
    crew: str = ""
    runner: ProcessId | None = None

    @property
    def key(self) -> str:
        """Return what names it among a study's attributes: "HOST/DIGEST"."""
        return f"{self.host}/{digest(self)}"


def this_process() -> ProcessId:
    """Return the identity of this process."""
    return process_id(os.getpid())


def process_id(pid: int) -> ProcessId:
    """Return the identity of a process of this host."""
    return ProcessId(pid=pid, started=_start_time(pid))


def this_worker(slot: int, *, crew: str = "", runner: ProcessId | None = None) -> WorkerId:
    """Return the identity of this process as a worker of a slot."""
    return WorkerId(
        **this_process().model_dump(),
        host=socket.gethostname(),
        slot=slot,
        kernel=_kernel(),
        crew=crew,
        runner=runner,
    )


def is_local(worker: WorkerId) -> bool:
    """Say whether a worker's process id means something here: same host, same boot, same container."""
    return worker.host == socket.gethostname() and worker.kernel == _kernel()


def is_alive(process: ProcessId) -> bool:
    """Say whether a process of this host still runs."""
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _start_time(process.pid) == process.started


def is_given_up(worker: WorkerId, runner: ProcessId) -> bool:
    """Say whether a worker of this host is gone and nobody but a runner may tell what ended it.

    Args:
        worker: The worker; its process id means something here (`is_local`).
        runner: Who looks. The dead of another runner that lives are left to that one.
    """
    if is_alive(worker):
        return False
    return worker.runner in (None, runner) or not is_alive(worker.runner)


def exit_with_parent(parent_pid: int) -> None:
    """Watch in a daemon thread whether the parent process still is `parent_pid`; end this process at once if not.

    A worker whose agent was killed has nobody left who would stop it. On Linux the kernel kills it, for a thread cannot
    end a process while another one holds the interpreter's lock, in a driver's call for example.
    """
    send_when_parent_ends(signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(_WATCH_INTERVAL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _kernel() -> str:
    """Return the boot and the process namespace that process ids of this process belong to, "" where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Return field 22 of /proc/PID/stat, "" where there is none.

    Source: proc_pid_stat(5); the second field is the command in parentheses and may hold spaces. A zombie counts as
        ended. It is no `Path`: that interns every part, and by each that is forgotten the interpreter's table of such
        strings, which is never compacted, comes nearer to its next size, 4 MB more in a process that looks for hours.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            text = file.read()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "ended" if fields[0] == "Z" else fields[19]
