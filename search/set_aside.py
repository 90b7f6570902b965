"""Logs that were set aside, refused by MLflow or damaged, are made again from Optuna, which has all numbers.

What each is about stands in its folder's name: trial-7, again-7, study, open or report (`search.tracking`).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import optuna

from search.confirmation import confirmations
from search.errors import StoreError
from search.findings import Finding
from search.logged import floor_metrics
from search.run_log import RunLog, again_log, study_log
from search.spool import GIVE_SERVER, Spool
from search.storage import stored_config, stored_floor
from search.tracking import Tracker
from search.watching import is_over


def aside_findings(
    spool: Spool, tracker: Tracker, study: optuna.Study, *, can_send: bool, is_busy: bool
) -> Iterator[Finding]:
    """Find logs that were set aside.

    Args:
        spool: The study's spool.
        tracker: Logs the study.
        study: The study.
        can_send: Whether the tracker logs to where the logs are for.
        is_busy: Whether the study is in progress, so that its run does not end.
    """
    for folder, why in spool.kept_aside():
        what = f"{folder} was set aside: {why}"
        if can_send:
            send = partial(_send_again, spool, tracker, study, folder, is_busy=is_busy)
            yield Finding("spool", what, "its files are sent, with its numbers as Optuna has them", send)
        else:
            yield Finding("spool", what, GIVE_SERVER)


def _send_again(spool: Spool, tracker: Tracker, study: optuna.Study, folder: Path, *, is_busy: bool) -> None:
    """Send what a log that was set aside stood for, with its files, and take it out of the spool.

    Raises:
        StoreError: If MLflow does not take it either, or Optuna does not know what it was about; it stays where it is.
    """
    tracker.send(_made_again(folder.name.partition("-")[2], study, is_busy=is_busy), spool.files_of(folder))
    spool.remove(folder)


def _made_again(label: str, study: optuna.Study, *, is_busy: bool) -> RunLog:
    kind, _, text = label.partition("-")
    number = int(text) if text.isdecimal() else -1
    if kind == "trial" and 0 <= number < len(study.get_trials(deepcopy=False)):
        return RunLog(number=number)  # `repair` has seen to its numbers
    if kind == "again" and number in (again := confirmations(study)):
        return again_log(number, again[number])
    if kind == "study":
        floor = stored_floor(study)
        return RunLog(number=None, metrics=() if floor is None else tuple(floor_metrics(floor)))
    if kind == "open":
        return study_log(stored_config(study)).model_copy(update={"status": None})
    if kind == "report":
        ended = "FINISHED" if is_over(study, stored_config(study)) else "KILLED"
        return RunLog(number=None, status=None if is_busy else ended)
    raise StoreError(f"Optuna must know what a log is about, but does not know {label}; remove it if nobody misses it")
