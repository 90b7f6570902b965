"""Which finished trials MLflow may not have yet while a study is in progress: their worker, or its spool, has them."""

from collections.abc import Collection
from datetime import datetime, timedelta

from optuna.trial import FrozenTrial

from search.resume import worker_of

SETTLE_S = 600.0
"""How long after a trial's end MLflow may not have it yet."""


def in_flight(trials: Collection[FrozenTrial]) -> set[int]:
    """Return the numbers of trials after whose end nothing of their host is known that came `SETTLE_S` later.

    Hosts have clocks of their own, so times are compared with times of the same host.
    """
    newest: dict[tuple[str, str] | None, datetime] = {}
    for trial in trials:
        for moment in (trial.datetime_start, trial.datetime_complete):
            if moment is not None:
                newest[_host(trial)] = max(moment, newest.get(_host(trial), moment))
    return {
        trial.number
        for trial in trials
        if (ended := trial.datetime_complete) is None or newest[_host(trial)] - ended < timedelta(seconds=SETTLE_S)
    }


def _host(trial: FrozenTrial) -> tuple[str, str] | None:
    worker = worker_of(trial)
    return None if worker is None else (worker.host, worker.kernel)
