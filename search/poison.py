"""Configs that end whoever works on them: after two tries they are marked, and never run again.

A try counts if its worker died, or hung, while the one who started it lived on: then it was not the machine that went
down. Each is written into the study under a key of its own, so that several hosts may write at once:

    study.user_attrs    crash:NUMBER    {"digest": of the config, "how": in words}

A config that is proposed again is answered with a violated constraint, from which samplers learn to keep away.
"""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hyquant.config import FrozenModel

MAX_TRIES = 2
POISONED = "poisoned"
"""The constraint that such a config violates, and the user attribute of a trial that was answered so."""

_KEY = "crash:"


class Crash(FrozenModel):
    """One try at a config that ended its worker."""

    digest: str
    how: str


def note_crash(study: optuna.Study, trial: FrozenTrial, how: str) -> tuple[int, ...]:
    """Write down that a trial ended its worker, and return the trials that its config crashed if those are too many.

    A trial whose config was not chosen yet blames none.
    """
    key = trial.user_attrs.get("config_digest")
    if key is None:
        return ()
    study.set_user_attr(f"{_KEY}{trial.number}", Crash(digest=str(key), how=how).model_dump())
    return poisoned_by(study.user_attrs, str(key))


def poisoned_by(study_attrs: Mapping[str, Any], config_digest: str) -> tuple[int, ...]:
    """Return the trials in which a config ended its worker, if it did so `MAX_TRIES` times; none otherwise."""
    numbers = [
        int(key.removeprefix(_KEY))
        for key, value in study_attrs.items()
        if key.startswith(_KEY) and Crash.model_validate(value).digest == config_digest
    ]
    return tuple(sorted(numbers)) if len(numbers) >= MAX_TRIES else ()
