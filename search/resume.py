"""Taking a stored study up again: whether it still is the same, and which running trials are lost."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from search.errors import StudyMismatch
from search.lean import WORKER
from search.lease import LEASE, LeaseWatch
from search.poison import note_crash
from search.processes import ProcessId, WorkerId, is_given_up, is_local, this_process
from search.prompts import StudyPrompts
from search.retry import DISK_TROUBLE, may_retry, queue_again, queue_handed_back, queued_again
from search.storage import stored_config, stored_prompts
from search.study import StudyConfig

HANDED_BACK = "its worker left; a trial with the same parameters was queued in its place"


@dataclass(frozen=True)
class Blame:
    """Who is held responsible for the end of a worker (`search.blame`).

    Attributes:
        how: Says how a trial ended its worker, None if it cannot be held responsible.
        forgive: Takes a try of a config that is marked now off the deaths of its slot.
        runner: Who may be blamed: workers that this process started. None is whoever looks.
    """

    how: Callable[[FrozenTrial], str | None]
    forgive: Callable[[FrozenTrial], None]
    runner: ProcessId | None = None


NO_BLAME = Blame(how=lambda trial: None, forgive=lambda trial: None)


def require_same_study(study: optuna.Study, config: StudyConfig, prompts: StudyPrompts) -> None:
    """Refuse to go on with a study that was made from another study file.

    Raises:
        StudyMismatch: If anything differs in what `StudyConfig.identity` returns, or the prompts do; the message shows
            every difference.
    """
    stored = {**stored_config(study).identity(), "prompts": stored_prompts(study).model_dump(mode="json")}
    given = {**config.identity(), "prompts": prompts.model_dump(mode="json")}
    if found := list(differences(stored, given)):
        listed = "".join(f"\n  - {line}" for line in found)
        raise StudyMismatch(
            f"a study is resumed with the file it was made from, but study {study.study_name!r} differs in "
            f"{len(found)} place{'s' * (len(found) > 1)}; undo the change or give the study a new name:{listed}"
        )


def differences(stored: Any, given: Any, where: str = "") -> Iterator[str]:
    """Yield one line per leaf in which two JSON values differ, such as `workload.seed: stored 42, file 43`."""
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        for key in dict.fromkeys([*stored, *given]):
            yield from differences(stored.get(key), given.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        for index, (old, new) in enumerate(zip(stored, given, strict=True)):
            yield from differences(old, new, f"{where}[{index}]")
    elif stored != given:
        yield f"{where}: stored {stored!r}, file {given!r}"


def reclaim_lost_trials(
    study: optuna.Study,
    watch: LeaseWatch | None = None,
    blame: Blame = NO_BLAME,
    *,
    trials: Iterable[FrozenTrial] | None = None,
) -> list[int]:
    """Fail running trials that are lost and queue their parameters again; return their numbers.

    Lost is what a dead process of this host had in hand, and what `watch` has seen without a moving lease for too long.
    The dead of another runner that lives are left to it: it alone can tell what ended them.

    Args:
        study: The study.
        watch: What this process knows of leases; None looks at processes alone.
        blame: Who is responsible. A config that ended its worker too often is marked and not queued again
            (`search.poison`).
        trials: All of the study, as they were just read; None reads them.
    """
    found = study.get_trials(deepcopy=False) if trials is None else trials
    running = [trial for trial in found if trial.state == TrialState.RUNNING]
    still = set() if watch is None else watch.lost(running)
    lost = [trial for trial in running if trial.number in still or is_dead_here(trial, blame.runner)]
    return [trial.number for trial in lost if _reclaimed(study, trial, blame)]


def _reclaimed(study: optuna.Study, trial: FrozenTrial, blame: Blame) -> bool:
    how = blame.how(trial)

    def queue(study: optuna.Study, trial: FrozenTrial) -> None:
        forgive_all(study, _noted_or_queued(study, trial, how), blame)

    return _taken_back(study, trial, queue, reason=how)


def forgive_all(study: optuna.Study, tries: Collection[int], blame: Blame) -> None:
    """Take each of these tries of a marked config off the deaths of the slot that made it."""
    for trial in study.get_trials(deepcopy=False) if tries else ():
        if trial.number in tries:
            blame.forgive(trial)


def reclaim(study: optuna.Study, leases: Mapping[int, object]) -> None:
    """Fail these trials, which were lost when they had these leases, and queue their parameters.

    Those that have ended since, or renewed their lease, are left alone.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.number in leases and trial.user_attrs.get(LEASE) == leases[trial.number]:
            _reclaimed(study, trial, NO_BLAME)


def queue_forgotten_trials(study: optuna.Study) -> list[int]:
    """Queue what somebody had failed as lost or handed back, but was killed before queueing it; return the numbers."""
    trials = study.get_trials(deepcopy=False)
    known = queued_again(trials)
    failed = [trial for trial in trials if trial.state == TrialState.FAIL and trial.number not in known]
    left = [t for t in failed if t.user_attrs.get("reason") == HANDED_BACK or DISK_TROUBLE in t.user_attrs]
    taken = [t for t in failed if was_taken_back(t)]
    lost = [t for t in taken if may_retry(t) and not _noted_or_queued(study, t, t.user_attrs.get("reason"))]
    for trial in left:
        queue_handed_back(study, trial)
    return [trial.number for trial in (*lost, *left)]


def _noted_or_queued(study: optuna.Study, taken: FrozenTrial, how: str | None) -> tuple[int, ...]:
    """Note how a trial that was taken back ended its worker, if it did, and queue it again unless its config is marked.

    Returns:
        The tries for which the config is marked; none if the trial was queued.
    """
    tries = () if how is None else note_crash(study, taken, how)
    if not tries:
        queue_again(study, taken)
    return tries


def hand_back_trials(study: optuna.Study, crew: str) -> list[int]:
    """Queue again what the slots of a worker of this host, or of its runner, have in hand; return the numbers.

    Called before the slots are stopped, or a runner of this host would see dead workers and count a lost attempt.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    left = [trial for trial in running if local_worker(trial, crew) is not None]
    return [trial.number for trial in left if _taken_back(study, trial, queue_handed_back, reason=HANDED_BACK)]


def was_taken_back(trial: FrozenTrial) -> bool:
    """Say whether a trial was failed as lost with its worker, by whomever."""
    is_explained = "stage" in trial.user_attrs or trial.user_attrs.get("reason") == HANDED_BACK
    return trial.state == TrialState.FAIL and not is_explained


def worker_of(trial: FrozenTrial) -> WorkerId | None:
    """Return who has, or had, a trial in hand; None if nobody."""
    stored = trial.user_attrs.get(WORKER)
    return None if stored is None else WorkerId.model_validate(stored)


def local_worker(trial: FrozenTrial, crew: str | None = None) -> WorkerId | None:
    """Return who of this host has, or had, a trial in hand, and of one crew if that is given; None if nobody."""
    worker = worker_of(trial)
    if worker is None or not is_local(worker) or crew not in (None, worker.crew):
        return None
    return worker


def is_dead_here(trial: FrozenTrial, runner: ProcessId | None = None) -> bool:
    """Say whether a trial was in the hands of a process of this host that is gone, with the runner that started it.

    Args:
        trial: A running trial.
        runner: Whose dead count though it lives; None is this process.
    """
    worker = local_worker(trial)
    return worker is not None and is_given_up(worker, runner or this_process())


def _taken_back(
    study: optuna.Study,
    trial: FrozenTrial,
    queue: Callable[[optuna.Study, FrozenTrial], None],
    *,
    reason: str | None = None,
) -> bool:
    """Fail a trial and queue it; False if its worker finished it, or somebody else took it back, meanwhile."""
    try:
        if reason is not None:
            study._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, UpdateFinishedTrialError):  # Optuna's words for a trial that has finished
        return False
    queue(study, trial)
    return True
