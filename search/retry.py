"""What happens to a trial whose worker died: its parameters are queued again, a few times at most."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial

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


def queue_again(study: optuna.Study, lost: FrozenTrial) -> None:
    """Add a waiting trial with the parameters of a lost one, unless it was lost `MAX_RETRIES` times already."""
    fresh = copy.deepcopy(lost)
    fresh.user_attrs = {key: value for key, value in lost.user_attrs.items() if key in INHERITED}
    with known_experiments():
        retry = RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES)
    retry(study, fresh)
