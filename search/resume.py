"""Taking a stored study up again: whether it still is the same, and which running trials have lost their worker."""

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from search.errors import StudyMismatch
from search.processes import WorkerId, is_alive, is_local
from search.prompts import StudyPrompts
from search.retry import queue_again
from search.storage import stored_config, stored_prompts
from search.study import StudyConfig

NAMELESS_GRACE = timedelta(seconds=30)
"""A worker writes its identity into a trial right after popping it; a running trial without one for so long is lost."""


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


def reclaim_lost_trials(study: optuna.Study, *, nameless_grace: timedelta = NAMELESS_GRACE) -> list[int]:
    """Fail running trials whose worker on this host is dead and queue their parameters again; return their numbers.

    Trials of other hosts are left to Optuna's heartbeat.
    """
    return [
        trial.number
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if _is_lost(trial, nameless_grace) and _fail_and_requeue(study, trial)
    ]


def _is_lost(trial: FrozenTrial, nameless_grace: timedelta) -> bool:
    stored = trial.user_attrs.get("worker")
    if stored is None:
        return trial.datetime_start is None or datetime.now() - trial.datetime_start >= nameless_grace
    worker = WorkerId.model_validate(stored)
    return is_local(worker) and not is_alive(worker)


def _fail_and_requeue(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Do what Optuna does with a stale trial; False if its worker, or another runner, finished it meanwhile."""
    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, UpdateFinishedTrialError):
        return False
    queue_again(study, trial)
    return True
