"""Which trials are held responsible for the end of their worker, and what is done about a worker that stands still.

Only who shares a runner or a joined worker with the dead one may blame: that one saw it die and lived on. What was lost
with its runner, with its host or behind a cut network proves nothing about a config.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from optuna.trial import FrozenTrial

from search.order import read_state, write_state
from search.processes import is_alive
from search.resume import Blame, local_worker
from search.watchdog import read_hang

logger = logging.getLogger(__name__)


def blame_within(crew: str, folder_of: Callable[[int], Path]) -> Blame:
    """Return what holds trials responsible for the end of workers of one crew, and their slots not.

    Args:
        crew: Whose workers may be blamed: "" for those of `run`.
        folder_of: The folder of a slot, by its index.
    """

    def how(trial: FrozenTrial) -> str | None:
        worker = local_worker(trial, crew)
        if worker is None:
            return None
        folder = folder_of(worker.slot)
        if is_alive(worker):
            return "its worker stood still and renewed no lease"
        return read_hang(folder, trial.number) or f"its worker died; see {folder / 'log.txt'}"

    def forgive(trial: FrozenTrial, tries: Sequence[int]) -> None:
        worker = local_worker(trial, crew)
        if worker is None:
            return
        state = read_state(folder := folder_of(worker.slot))
        try:
            write_state(folder, state.model_copy(update={"forgiven": state.forgiven + len(tries)}))
        except OSError as error:
            logger.warning("a slot's state needs room in %s, but: %s; free some", folder, error)

    return Blame(how, forgive)


def end_still_workers(lost: Iterable[FrozenTrial], crew: str) -> None:
    """Kill workers of this crew whose trial was taken from them: torchrun starts their group anew."""
    for trial in lost:
        worker = local_worker(trial, crew)
        if worker is not None and is_alive(worker):
            os.kill(worker.pid, signal.SIGKILL)
