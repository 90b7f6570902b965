"""Finished trials as a process holds them: all of a study's are in memory, so each is held in few bytes.

The database has JSON that anyone can read. In memory the longest of it is deflated, and what many trials have in common
is one object: the distributions of their parameters, the worker that ran them. Trials that are not finished stay as
Optuna makes them, because Optuna changes them.
"""

import base64
import json
import zlib
from collections.abc import Hashable
from typing import Any

from optuna.trial import FrozenTrial

RESULT, CONFIG, WORKER = "result", "config", "worker"
"""The longest user attributes of a trial."""

_FASTEST = 1
_MARK = "zlib:"  # no JSON begins like this


class LeanTrials:
    """Makes finished trials lean; what they have in common is remembered for as long as this object lives."""

    def __init__(self) -> None:
        self._shared: dict[Hashable, Any] = {}

    def lean(self, trial: FrozenTrial) -> FrozenTrial:
        """Change a trial that was just read, if it is finished, and return it."""
        if not trial.state.is_finished():
            return trial
        trial.distributions = self._one_of(tuple(trial.distributions.items()), trial.distributions)
        attributes = trial.user_attrs
        for name in {RESULT, CONFIG} & attributes.keys():
            attributes[name] = deflated(attributes[name])
        if WORKER in attributes:
            attributes[WORKER] = self._one_of(json.dumps(attributes[WORKER]), attributes[WORKER])
        return trial

    def _one_of(self, key: Hashable, value: Any) -> Any:
        return self._shared.setdefault(key, value)


def deflated(value: object) -> str | None:
    """Return the JSON of an attribute, which may be text already, deflated, as text that a proxy can send; or None."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return _MARK + base64.b64encode(zlib.compress(text.encode(), _FASTEST)).decode()


def inflated(stored: Any) -> Any:
    """Return an attribute as it was stored: text for what is deflated, anything else as it is."""
    if not isinstance(stored, str) or not stored.startswith(_MARK):
        return stored
    return zlib.decompress(base64.b64decode(stored[len(_MARK) :])).decode()
