"""The command lines under test, each on a host with a disk of its own, started again whenever they end too early."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.chaos.network import on_host

RESTART_AFTER_S = 2.0
HYQ_SEARCH = (sys.executable, "-c", "from search.cli import main; main()")


@dataclass
class Worker:
    """One command: `hyq-search run` or `hyq-search worker`.

    Attributes:
        name: For the log.
        host: Where it runs.
        store: Its store, on a disk of its own.
        arguments: What follows `hyq-search`.
        log: Where its output goes.
        process: The running command, or the ended one.
        num_starts: How often it was started.
        ended: Monotonic time at which its end was noticed.
    """

    name: str
    host: str
    store: Path
    arguments: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    num_starts: int = 0
    ended: float | None = None

    def start(self) -> None:
        """Start the command."""
        scratch = self.store.parent / f"tmp-{self.name}"
        scratch.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                on_host(self.host, [*HYQ_SEARCH, *self.arguments]),
                env={**os.environ, "TMPDIR": str(scratch)},
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.num_starts += 1
        self.ended = None

    @property
    def is_running(self) -> bool:
        """Say whether the command runs."""
        return self.process is not None and self.process.poll() is None

    def see_to_it(self) -> None:
        """Start the command again a moment after it ended."""
        if self.is_running:
            return
        if self.ended is None:
            self.ended = time.monotonic()
        elif time.monotonic() - self.ended > RESTART_AFTER_S:
            self.start()

    def agents(self) -> list[psutil.Process]:
        """Return the torchrun agents."""
        return self._below("search.agent")

    def ranks(self) -> list[psutil.Process]:
        """Return the ranks."""
        return [process for process in self._below("search.worker") if "search.agent" not in _words(process)]

    def tree(self) -> list[psutil.Process]:
        """Return the command and everything below it."""
        if not self.is_running:
            return []
        assert self.process is not None
        try:
            command = psutil.Process(self.process.pid)
            return [command, *command.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill_tree(self) -> int:
        """Kill the command and everything below it; return how many processes that were."""
        return sum(send(process, signal.SIGKILL) for process in self.tree())

    def _below(self, module: str) -> list[psutil.Process]:
        return [process for process in self.tree() if module in _words(process)]


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Send a signal; False if the process is gone."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
