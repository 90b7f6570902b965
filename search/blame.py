"""Which trials are held responsible for the end of their worker, and what is done about a worker that stands still.

Only who shares a runner (the process of a `run` or `worker`) with the dead one may blame: that one saw it die and lived
on. What was lost with its runner, with its host or behind a cut network proves nothing about a config.
"""

import logging
import os
import signal
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.order import read_state, write_state
from search.poison import MAX_TRIES, note_crash
from search.processes import ProcessId, WorkerId, is_alive, is_local
from search.resume import Blame, forgive_all, local_worker, was_taken_back, worker_of
from search.watchdog import read_hang

logger = logging.getLogger(__name__)

MAX_FORGIVEN = 2 * MAX_TRIES
"""Deaths in a row that marked configs may be to blame for: where a third config does the same, it is the machine."""


def blame_within(runner: ProcessId | None, folder_of: Callable[[int], Path]) -> Blame:
    """Return what holds trials responsible for the end of workers of one runner, and their slots not.

    Args:
        runner: Who started them; one that was started before under the same name is another.
        folder_of: The folder of a slot, by its index.
    """

    def how(trial: FrozenTrial) -> str | None:
        worker = _worker_under(runner, trial)
        if worker is None:
            return None
        folder = folder_of(worker.slot)
        if read_state(folder).stopped is not None:
            return None  # it ended by itself, and said why
        if is_alive(worker):
            return "its worker stood still and renewed no lease"
        return read_hang(folder, trial.number) or f"its worker died; see {folder / 'log.txt'}"

    def forgive(trial: FrozenTrial) -> None:
        worker = _worker_under(runner, trial)
        if worker is None:
            return
        state = read_state(folder := folder_of(worker.slot))
        try:
            write_state(folder, state.model_copy(update={"forgiven": min(state.forgiven + 1, MAX_FORGIVEN)}))
        except OSError as error:
            logger.warning("a slot's state needs room in %s, but: %s; free some", folder, error)

    return Blame(how, forgive, runner)


def taken_from_still_workers(
    trials: Sequence[FrozenTrial], doubtful: Collection[object], runner: ProcessId
) -> list[FrozenTrial]:
    """Return the trials that somebody has taken from workers of this runner that stand still.

    Args:
        trials: All trials of the study.
        doubtful: The numbers of those whose lease stood still here too (`LeaseWatch.doubtful`): a worker that was cut
            off together with this host is none.
        runner: Who started the workers.
    """
    at_work = {worker_of(trial) for trial in trials if trial.state == TrialState.RUNNING}
    taken = [trial for trial in trials if trial.number in doubtful and was_taken_back(trial)]
    holders = [(trial, _worker_under(runner, trial)) for trial in taken]
    return [trial for trial, worker in holders if worker and worker not in at_work and is_alive(worker)]


def blame_still_workers(study: optuna.Study, taken: Iterable[FrozenTrial], blame: Blame) -> None:
    """Note what became of workers from whom others, who may not blame, have taken these trials."""
    for trial in taken:
        how = None if "reason" in trial.user_attrs else blame.how(trial)  # with a reason it is noted already
        if how is not None:
            forgive_all(study, note_crash(study, trial, how), blame)


def end_still_workers(workers: Iterable[WorkerId | None], runner: ProcessId) -> None:
    """Kill those of these workers that are this runner's and live: torchrun starts their group anew."""
    for worker in workers:
        if worker is not None and is_local(worker) and worker.runner == runner and is_alive(worker):
            os.kill(worker.pid, signal.SIGKILL)


def _worker_under(runner: ProcessId | None, trial: FrozenTrial) -> WorkerId | None:
    """Return who of this runner has, or had, a trial in hand; None if nobody."""
    worker = local_worker(trial)
    return None if worker is None or runner is None or worker.runner != runner else worker
