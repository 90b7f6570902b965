"""Where the parts of a study contradict each other: Optuna, MLflow, the spool, and what lies in the store.

Looking writes nothing. While the study is in progress, what is in flight is no contradiction: a trial that has just
ended is not in MLflow yet, and its log lies in the spool for a moment.
"""

import re
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.trial import TrialState

from search.errors import StoreError
from search.findings import Finding, mend
from search.in_flight import SETTLE_S, in_flight
from search.lease import LEASE, LeaseWatch
from search.leftovers import artifact_findings, cache_findings, hang_findings, writer_findings
from search.locks import held_by_workers
from search.mlflow_client import database_path, prepare_store
from search.repair import differences, repair
from search.resume import is_dead_here, local_worker, reclaim
from search.set_aside import aside_findings
from search.spool import GIVE_SERVER, Spool
from search.storage import stored_config
from search.study_run import OtherStudy
from search.tracking import Tracker

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
    tracker, spool = Tracker.of(place.store, study, place.tracking), Spool(place.store, place.study)
    lacks_server = place.tracking is None and spool.is_for_server()
    found = [*_trial_findings(study, stale), *_spool_findings(place, spool, tracker, is_busy=is_busy)]
    if lacks_server:
        found.append(Finding("MLflow and Optuna", "the record is on an MLflow server; it was not given", GIVE_SERVER))
    else:
        found += _mlflow_findings(place, study, spool, tracker, is_busy=is_busy)
    # behind the runs that its files go to
    found += aside_findings(spool, tracker, study, can_send=not lacks_server, is_busy=is_busy)
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
    reasons: dict[str, str] = {}
    for _ in range(MAX_ROUNDS):
        if all(finding.mend is None for finding in left):
            break
        reasons = mend(left)
        left = look()
        found += tuple(finding for finding in left if finding.sentence not in {known.sentence for known in found})
    return found, tuple(
        finding._replace(way_out=f"not mended: {reasons[finding.sentence]}") if finding.sentence in reasons else finding
        for finding in left
    )


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


def _mlflow_findings(
    place: Place, study: optuna.Study, spool: Spool, tracker: Tracker, *, is_busy: bool
) -> Iterator[Finding]:
    correct = partial(_correct_mlflow, place, study, tracker)
    waiting = {spooled.log.number for spooled in spool.waiting()}
    try:
        runs = tracker.trial_runs()
    except OtherStudy as error:
        yield Finding("MLflow and Optuna", str(error), "until then nothing is changed there")
        return
    except StoreError as error:
        yield Finding("MLflow and Optuna", str(error), "is made from Optuna, if MLflow answers", correct)
        return
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}  # after the runs: see `repair`
    passed_over = waiting | in_flight(trials.values()) if is_busy else waiting
    for difference in differences(trials.values(), runs):
        if difference.number not in passed_over:
            yield Finding("MLflow and Optuna", str(difference), "is made to agree with Optuna", correct)


def _correct_mlflow(place: Place, study: optuna.Study, tracker: Tracker) -> None:
    """Make MLflow agree, and the study's run in it if there is none.

    Raises:
        StoreError: If MLflow does not answer, or does not take something.
    """
    if place.tracking is None:
        prepare_store(place.store)
    if not tracker.knows_study():
        tracker.open_study(stored_config(study).without_places())
    if refused := repair(place.store, study, place.tracking).refused:
        raise StoreError(refused[0])


def _spool_findings(place: Place, spool: Spool, tracker: Tracker, *, is_busy: bool) -> Iterator[Finding]:
    for spooled in spool.waiting():
        if is_busy and spooled.age_s <= SETTLE_S:
            continue
        if spooled.log.is_for_server and place.tracking is None:
            yield Finding("spool", f"{spooled.folder} waits for an MLflow server", GIVE_SERVER)
        else:
            yield Finding("spool", f"{spooled.folder} waits for MLflow", "is sent", tracker.deliver)
    for folder in spool.damaged():
        yield Finding("spool", f"the log in {folder} is damaged", "is set aside, its files are sent", tracker.deliver)
    for path in spool.leftovers():
        yield Finding("spool", f"{path} was left by a killed process", "is removed", tracker.deliver)


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
