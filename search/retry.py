"""What happens to a trial that was not finished: its parameters are queued again.

Lost with its worker, a trial is queued again a few times at most; handed back by a worker that leaves, always.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import optuna
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

MAX_RETRIES = 2
"""A config that kills its worker (a crash, the kernel's out-of-memory killer) must not do so for ever."""

INHERITED = ("preset", "handwritten")
"""User attributes that say what a trial is; all others tell what one attempt at it did."""


@contextmanager
def known_experiments() -> Iterator[None]:
    """Use parts of Optuna that it calls experimental (heartbeats, grouped TPE) without being warned each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


DISK_TROUBLE = "disk_trouble"
"""User attribute of a failed trial that a disk refused something; it is queued again and counts as no attempt."""

HANDED_BACK_FROM = "handed_back_from"
QUEUE_ATTRIBUTES = ("fixed_params", "failed_trial", "retry_history")
"""System attributes by which Optuna queues and counts; constraints of an attempt are none of them."""


def queue_again(study: optuna.Study, lost: FrozenTrial) -> None:
    """Add a waiting trial with the parameters of a lost one, unless it was lost `MAX_RETRIES` times already."""
    with known_experiments():
        retry = RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES)
    retry(study, _untried(lost))


def may_retry(lost: FrozenTrial) -> bool:
    """Say whether a lost trial is tried again."""
    return len(lost.system_attrs.get("retry_history", ())) < MAX_RETRIES


def queue_handed_back(study: optuna.Study, left: FrozenTrial) -> None:
    """Add a waiting trial with the parameters of one that its worker has left; that is no attempt that failed."""
    fresh = _untried(left)
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=fresh.params,
            distributions=fresh.distributions,
            user_attrs=fresh.user_attrs,
            system_attrs={**fresh.system_attrs, HANDED_BACK_FROM: left.number},
        )
    )


def queued_again(trials: Iterable[FrozenTrial]) -> set[int]:
    """Return the numbers of trials in whose place another was queued."""
    found: set[int] = set()
    for trial in trials:
        found.update(trial.system_attrs.get("retry_history", ()))
        found.update({trial.system_attrs[HANDED_BACK_FROM]} if HANDED_BACK_FROM in trial.system_attrs else ())
    return found


def _untried(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial without what one attempt at it did."""
    fresh = copy.deepcopy(trial)
    fresh.user_attrs = {key: value for key, value in trial.user_attrs.items() if key in INHERITED}
    fresh.system_attrs = {key: value for key, value in fresh.system_attrs.items() if key in QUEUE_ATTRIBUTES}
    return fresh
