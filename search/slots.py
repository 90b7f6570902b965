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

from hyquant.devices import resolve_device
from search.errors import SearchError
from search.order import ORDER_VARIABLE, SlotState, WorkOrder, read_state, write_state
from search.study import Slot

logger = logging.getLogger(__name__)

MAX_RESTARTS = 1000
"""torchrun's limit on restarts in all; the workers themselves stop after three deaths in a row."""

TERMINATION_GRACE_S = 10


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

    def failure(self) -> str | None:
        """Return why a slot that has ended did not do its work; None if it did."""
        stopped = read_state(self.folder).stopped
        if stopped is not None:
            return stopped
        if self.agent.returncode:
            return f"its agent ended with code {self.agent.returncode}; see {self.folder / 'log.txt'}"
        return None


def start_slots(slots: Sequence[Slot], order: WorkOrder, *, device: str) -> list[RunningSlot]:
    """Start the agent of every slot; each has a session of its own, so that Ctrl-C reaches the runner alone."""
    return [
        _start(index, slot, order.model_copy(update={"slot": index}), slots, device=device)
        for index, slot in enumerate(slots)
    ]


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
    slot: Slot, slots: Sequence[Slot], *, device: str, environment: Mapping[str, str], num_cores: int
) -> dict[str, str]:
    """Return the environment of a slot's ranks: its devices, and its share of the cores unless OMP_NUM_THREADS is set.

    Raises:
        SearchError: If the slot names devices and the kind of device has no variable for that.
    """
    result = dict(environment)
    if slot.devices is not None:
        name = resolve_device(device).visible_devices_env
        if name is None:
            raise SearchError(
                f"slots of {device} devices cannot name devices, but one names {slot.devices!r}; delete it"
            )
        result[name] = slot.devices
    num_ranks = sum(other.ranks for other in slots)
    result.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_ranks)))
    return result


def agent_command(slot: Slot, order: WorkOrder, *, runner_pid: int) -> list[str]:
    """Return the command of a slot's agent: torchrun with a rendezvous of its own on a free loopback port."""
    torchrun = [
        "--nnodes=1",
        f"--nproc-per-node={slot.ranks}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        f"--rdzv-id={order.study}-slot{order.slot}",
        "--local-addr=127.0.0.1",
        f"--max-restarts={MAX_RESTARTS}",
        "--module",
        "search.worker",
    ]
    return [sys.executable, "-m", "search.agent", str(runner_pid), str(TERMINATION_GRACE_S), *torchrun]


def _start(index: int, slot: Slot, order: WorkOrder, slots: Sequence[Slot], *, device: str) -> RunningSlot:
    folder = order.folder
    write_state(folder, SlotState())
    (folder / "leave").unlink(missing_ok=True)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = slot_environment(slot, slots, device=device, environment=os.environ, num_cores=num_cores)
    with (folder / "log.txt").open("ab") as log:
        agent = subprocess.Popen(
            agent_command(slot, order, runner_pid=os.getpid()),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, ORDER_VARIABLE: order.model_dump_json()},
            start_new_session=True,
        )
    logger.info("slot index=%d ranks=%d agent_pid=%d", index, slot.ranks, agent.pid)
    return RunningSlot(index=index, agent=agent, folder=folder)
