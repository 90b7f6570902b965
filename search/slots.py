"""The runner's side of a slot: start its torchrun agent with the right environment, watch it, stop it."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from search.claims import Claim, claimed
from search.order import ORDER_VARIABLE, SlotState, WorkOrder, read_state, read_worker, told_ns, write_state
from search.processes import ProcessId, is_alive, this_process
from search.slot_devices import AUTO, cores_here, read_devices
from search.study import Slot

logger = logging.getLogger(__name__)

MAX_RESTARTS = 1000
"""torchrun's limit on restarts in all; the workers themselves stop after three deaths in a row."""

TERMINATION_GRACE_S = 10

LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"

MAX_LOG_BYTES = 16 * 2**20
"""A log that is longer when a slot starts becomes `log.old.txt`, so that no slot keeps more than two."""


@dataclass(frozen=True)
class SlotSigns:
    """What a slot tells of itself on its host, without the study's database.

    Attributes:
        is_running: Whether its agent runs.
        worker: The process of its rank 0; None if that is dead, or not there yet.
        told_ns: When it last wrote its state, as after every trial.
    """

    is_running: bool
    worker: ProcessId | None
    told_ns: int


@dataclass(frozen=True)
class RunningSlot:
    """A started slot: its agent process and where it logs."""

    index: int
    agent: subprocess.Popen[bytes]
    folder: Path

    @property
    def is_running(self) -> bool:
        """Say whether the agent still runs."""
        return self.agent.poll() is None

    def signs(self) -> SlotSigns:
        """Look at the slot's processes and its folder."""
        worker = read_worker(self.folder)
        is_there = worker is not None and is_alive(worker)
        return SlotSigns(self.is_running, worker if is_there else None, told_ns(self.folder))

    def failure(self) -> str | None:
        """Return why a slot that has ended did not do its work; None if it did."""
        stopped = read_state(self.folder).stopped
        if stopped is not None:
            return stopped
        if self.agent.returncode:
            return f"its agent ended with code {self.agent.returncode}; see {self.folder / 'log.txt'}"
        return None


def start_slots(slots: Sequence[Slot], order: WorkOrder, *, device: str) -> list[RunningSlot]:
    """Start the agent of every slot; each has a session of its own, so that Ctrl-C reaches the runner alone.

    What a slot claims on the host, its agent holds from then on, and nobody once it has ended.

    Raises:
        SearchError: If devices or ports are not there, or held by another slot; no slot is started then.
    """
    claims = claimed(slots, order, device=device)
    order = order.model_copy(update={"runner": this_process()})
    try:
        return [
            _start(index, claim, order.model_copy(update={"slot": index}), claims) for index, claim in enumerate(claims)
        ]
    finally:
        for claim in claims:
            claim.release()


def stop_slots(slots: Sequence[RunningSlot], *, is_impatient: Callable[[], bool]) -> None:
    """End all slots: politely first, and by force when their grace is over or the user has lost patience."""
    try:
        for slot in slots:
            if slot.is_running:
                slot.agent.terminate()
        deadline = time.monotonic() + 2 * TERMINATION_GRACE_S
        while any(slot.is_running for slot in slots) and time.monotonic() < deadline and not is_impatient():
            time.sleep(0.1)
    finally:
        for slot in slots:
            if slot.is_running:
                os.killpg(slot.agent.pid, signal.SIGKILL)
            slot.agent.wait()


def slot_environment(
    claim: Claim, claims: Sequence[Claim], *, environment: Mapping[str, str], num_cores: int
) -> dict[str, str]:
    """Return the environment of a slot's ranks.

    What the slot itself sets goes before what the user's environment has, and that before our defaults: the library's
    variables for its device, its ports, its share of the cores, and loopback for what its ranks tell each other.
    """
    slot = claim.slot
    threads = num_cores // sum(other.slot.ranks for other in claims)
    if claim.cores:
        threads = len(claim.cores) // slot.ranks
    ours = {"OMP_NUM_THREADS": str(max(1, threads)), "GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE}
    result = {**ours, **claim.defaults, **environment}
    if claim.devices is not None and claim.variable is not None:
        result[claim.variable] = ",".join(claim.devices)
    return result | {name: str(value) for name, value in slot.environment.items()}


def rank_threads(slots: Sequence[Slot]) -> int:
    """Return in how many threads a rank of the first of some slots computes here where models run on the CPU."""
    claims = [Claim(slot, None if slot.devices in (None, AUTO) else read_devices(slot.devices)) for slot in slots]
    num_cores = len(cores_here())
    given = slot_environment(claims[0], claims, environment=os.environ, num_cores=num_cores)["OMP_NUM_THREADS"]
    first = given.partition(",")[0].strip()
    return min(int(first), num_cores) if first.isdecimal() and int(first) > 0 else num_cores


def agent_command(slot: Slot, order: WorkOrder, *, runner_pid: int, cores: Sequence[int] = ()) -> list[str]:
    """Return the command of a slot's agent: torchrun, which needs no port and no folder of its own."""
    torchrun = [
        "--nnodes=1",
        f"--nproc-per-node={slot.ranks}",
        f"--rdzv-id={order.study}-slot{order.slot}",
        f"--log-dir={os.devnull}",
        f"--max-restarts={MAX_RESTARTS}",
        "--module",
        "search.worker",
    ]
    spelled = ",".join(map(str, cores)) or "all"
    return [sys.executable, "-m", "search.agent", str(runner_pid), str(TERMINATION_GRACE_S), spelled, *torchrun]


def keep_short(log: Path) -> None:
    """Put a long log aside, over the one that was put aside before."""
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.replace(log.with_name("log.old.txt"))


def _start(index: int, claim: Claim, order: WorkOrder, claims: Sequence[Claim]) -> RunningSlot:
    slot, folder = claim.slot, order.folder
    write_state(folder, SlotState())
    (folder / "leave").unlink(missing_ok=True)
    environment = slot_environment(claim, claims, environment=os.environ, num_cores=len(cores_here()))
    keep_short(folder / "log.txt")
    with (folder / "log.txt").open("ab") as log:
        agent = subprocess.Popen(
            agent_command(slot, order, runner_pid=os.getpid(), cores=claim.cores),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, ORDER_VARIABLE: order.model_dump_json()},
            start_new_session=True,
            pass_fds=[lock.fileno() for lock in claim.locks],
        )
    logger.info("slot index=%d ranks=%d agent_pid=%d", index, slot.ranks, agent.pid)
    return RunningSlot(index=index, agent=agent, folder=folder)
