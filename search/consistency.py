"""Where the parts of a study contradict each other: Optuna, MLflow, the spool, and what lies in the store.

Looking writes nothing. While the study is in progress, what is in flight is no contradiction: a trial that has just
ended is not in MLflow yet, and its log lies in the spool for a moment.
"""

import re
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.errors import StoreError
from search.findings import Finding, mend
from search.lease import LEASE, LeaseWatch
from search.leftovers import artifact_findings, cache_findings, hang_findings, writer_findings
from search.locks import held_by_workers
from search.mlflow_client import database_path, prepare_store
from search.repair import differences, repair
from search.resume import is_dead_here, local_worker, reclaim
from search.run_log import RunLog
from search.spool import Spool
from search.storage import stored_config
from search.tracking import Tracker

SETTLE_S = 600.0
"""How long after a trial's end MLflow may not have it yet, while the study is in progress."""

MAX_ROUNDS = 3

PARTS = ("trials", "MLflow and Optuna", "spool", "artifacts", "cache", "leftovers", "notes")


class Place(NamedTuple):
    """Where a study is: its store on this host, and the MLflow server if it has one."""

    store: Path
    study: str
    tracking: str | None = None


def findings(place: Place, study: optuna.Study, *, grace_s: float) -> tuple[Finding, ...]:
    """Return what is wrong with a study. Trials that no worker of this host has are watched for up to `grace_s`."""
    stale = stale_trials(study, grace_s=grace_s)
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    is_busy = is_in_progress(place.store, place.study) or any(trial.number not in stale for trial in running)
    found = [*_trial_findings(study, stale), *_spool_findings(place, is_busy=is_busy)]
    found += _mlflow_findings(place, study, is_busy=is_busy)
    if place.tracking is None:
        found += _tolerant(lambda: artifact_findings(place.store))
    found += [*cache_findings(place.store), *writer_findings(place.store, place.study)]
    return (*found, *hang_findings(place.store, study))


def mended(place: Place, study: optuna.Study, *, grace_s: float) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Mend what can be mended; return all that was found, and what is left of it.

    Mending shows more: a trial that is taken back must become a failed run in MLflow. Artifacts stay where they are if
    MLflow's database is made here: it knows no run of before, and a copy may be put back.
    """
    had_runs = database_path(place.store).is_file()

    def look() -> tuple[Finding, ...]:
        seen = findings(place, study, grace_s=grace_s)
        return seen if had_runs else tuple(map(_left_alone, seen))

    left = found = look()
    for _ in range(MAX_ROUNDS):
        if all(finding.mend is None for finding in left):
            break
        mend(left)
        left = look()
        found += tuple(finding for finding in left if finding.sentence not in {known.sentence for known in found})
    return found, left


def is_in_progress(store: Path, study: str) -> bool:
    """Say whether a runner or a worker of this host has the study in hand."""
    host = re.escape(socket.gethostname())  # it and the study's name may hold dots: those of other studies are no host
    own = re.compile(rf"{re.escape(study)}\.(runner|({host}|[^.]+)-[0-9a-f]{{6}}-\d+)\.lock")
    return any(own.fullmatch(path.name) for path in held_by_workers(store))


def stale_trials(
    study: optuna.Study, *, grace_s: float, poll_s: float = 1.0, clock: Callable[[], float] = time.monotonic
) -> dict[int, object]:
    """Return the running trials that nobody has in hand, with their leases.

    Of this host's workers it is known at once; those of others must renew a lease within `grace_s`, of which time when
    nobody could look does not count (`search.lease`).
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    dead = {trial.number: trial.user_attrs.get(LEASE) for trial in running if is_dead_here(trial)}
    quiet = {trial.number: trial.user_attrs.get(LEASE) for trial in running if local_worker(trial) is None}
    watch = LeaseWatch(grace_s, clock)
    while watch.stopped(quiet) != set(quiet):
        time.sleep(min(poll_s, grace_s))
        still = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        leases = {trial.number: trial.user_attrs.get(LEASE) for trial in still}
        quiet = {number: lease for number, lease in quiet.items() if leases.get(number, _GONE) == lease}
    return dead | quiet


def _trial_findings(study: optuna.Study, stale: dict[int, object]) -> Iterator[Finding]:
    take_back = partial(reclaim, study, stale)
    for number in sorted(stale):
        yield Finding("trials", f"trial {number} is running, but no worker has it", "is queued again", take_back)


def _mlflow_findings(place: Place, study: optuna.Study, *, is_busy: bool) -> Iterator[Finding]:
    correct = partial(_correct_mlflow, place, study)
    waiting = {spooled.log.number for spooled in Spool(place.store, place.study).waiting()}
    try:
        runs = Tracker(place.store, place.study, place.tracking).trial_runs()
    except StoreError as error:
        yield Finding("MLflow and Optuna", str(error), "is made from Optuna, if MLflow answers", correct)
        return
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}  # after the runs: see `repair`
    for difference in differences(trials.values(), runs):
        trial = trials.get(difference.number)
        is_in_flight = is_busy and trial is not None and _has_just_ended(trial)
        if not is_in_flight and difference.number not in waiting:
            yield Finding("MLflow and Optuna", str(difference), "is made to agree with Optuna", correct)


def _has_just_ended(trial: FrozenTrial) -> bool:
    ended = trial.datetime_complete
    return ended is None or abs((datetime.now() - ended).total_seconds()) < SETTLE_S


def _correct_mlflow(place: Place, study: optuna.Study) -> None:
    """Make MLflow agree, and the study's run in it if there is none.

    Raises:
        StoreError: If MLflow does not answer.
    """
    tracker = Tracker(place.store, place.study, place.tracking)
    if place.tracking is None:
        prepare_store(place.store)
    if not tracker.knows_study():
        tracker.open_study(stored_config(study).without_places())
    repair(place.store, study, place.tracking)


def _spool_findings(place: Place, *, is_busy: bool) -> Iterator[Finding]:
    spool = Spool(place.store, place.study)
    tracker = Tracker(place.store, place.study, place.tracking)
    for spooled in spool.waiting():
        if not is_busy or spooled.age_s > SETTLE_S:
            yield Finding("spool", f"{spooled.folder} waits for MLflow", "is sent", tracker.deliver)
    for folder in spool.damaged():
        yield Finding("spool", f"the log in {folder} is damaged", "is set aside, its files are sent", tracker.deliver)
    for path in spool.leftovers():
        yield Finding("spool", f"{path} was left by a killed process", "is removed", tracker.deliver)
    for folder, why in spool.kept_aside():
        yield Finding(
            "spool",
            f"{folder} was set aside: {why}",
            "its numbers are in MLflow from Optuna, its files are sent",
            partial(_send_aside, spool, tracker, folder),
        )


def _send_aside(spool: Spool, tracker: Tracker, folder: Path) -> None:
    """Send the files alone of a log that was set aside to its trial's run: Optuna has all numbers.

    Raises:
        StoreError: If MLflow does not take them either; they stay where they are.
    """
    number = folder.name.rpartition("-")[2]
    files = spool.files_of(folder)
    if number.isdecimal() and files is not None:
        tracker.send(RunLog(number=int(number)), files)
    spool.remove(folder)


def _left_alone(finding: Finding) -> Finding:
    """Return a finding about artifacts without its mending."""
    if finding.part != "artifacts":
        return finding
    way_out = "stays, as MLflow's database is new: put a copy of the old one back, or --repair again"
    return finding._replace(way_out=way_out, mend=None)


def _tolerant(look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Return what is found, or nothing where MLflow does not answer, which is a finding of its own."""
    try:
        return list(look())
    except StoreError:
        return []


_GONE = object()
