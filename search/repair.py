"""Makes MLflow agree with Optuna, which is the truth.

A killed worker leaves a run RUNNING; one that could not reach MLflow leaves none; one killed between its last log line
and Optuna's word leaves a run that claims too much. `differences` names what is wrong trial by trial, `repair` puts it
right. Trials that are still running are left alone: their worker is about to log them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.trial import FrozenTrial

from search.logged import result_metrics
from search.mlflow_client import Refused
from search.run_log import RUN_STATUS, trial_log
from search.study_run import TrialRun
from search.tracking import Tracker
from search.trials import trial_reason, trial_result, trial_state


@dataclass(frozen=True)
class Difference:
    """One trial that the two databases tell differently."""

    number: int
    what: str
    extra_runs: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the difference as a sentence without a full stop."""
        return f"trial {self.number} {self.what}"


class Repaired(NamedTuple):
    """What was wrong in MLflow, one sentence each: what is right now, and what MLflow refused to correct, and why."""

    corrected: tuple[str, ...]
    refused: tuple[str, ...]


def agreement(store: Path, study: optuna.Study, uri: str | None = None) -> tuple[str, ...]:
    """Return in one sentence each where MLflow and Optuna differ; nothing is written.

    Raises:
        StoreError: If the MLflow store does not answer or does not know the study.
    """
    runs = Tracker.of(store, study, uri).trial_runs()
    return tuple(str(difference) for difference in differences(study.get_trials(deepcopy=False), runs))


def repair(store: Path, study: optuna.Study, uri: str | None = None) -> Repaired:
    """Correct MLflow where it differs from Optuna and return what was wrong.

    What waits in the spool is sent first. A run that was lost without a trace there gets its parameters and numbers
    back, not its videos; a run that exists keeps its files. A trial that MLflow refuses holds up no other.

    Raises:
        StoreError: If the MLflow store does not answer, does not know the study or has another one of its name.
    """
    tracker = Tracker.of(store, study, uri)
    tracker.deliver()
    runs = tracker.trial_runs()  # before the trials, or a run of a trial begun meanwhile would look like nobody's
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    corrected, refused = [], []
    for difference in differences(trials.values(), runs):
        try:
            _put_right(tracker, difference, trials.get(difference.number))
        except Refused as refusal:
            refused.append(f"{difference}: {refusal}")
        else:
            corrected.append(str(difference))
    return Repaired(tuple(corrected), tuple(refused))


def _put_right(tracker: Tracker, difference: Difference, trial: FrozenTrial | None) -> None:
    for run_id in difference.extra_runs:
        tracker.delete_run(run_id)
    if trial is not None:
        log = trial_log(
            trial.number,
            trial_state(trial),
            trial_result(trial),
            reason=trial_reason(trial),
            span=(trial.datetime_start, trial.datetime_complete),
            is_repaired=True,
        )
        tracker.send(log)


def differences(trials: Iterable[FrozenTrial], runs: Iterable[TrialRun]) -> tuple[Difference, ...]:
    """Compare every finished trial with its run, and find runs without a trial."""
    by_number: dict[int, list[TrialRun]] = {}
    for run in runs:
        by_number.setdefault(run.number, []).append(run)
    found: list[Difference] = []
    known = set()
    for trial in trials:
        state = trial_state(trial)
        known.add(trial.number)
        if state in ("running", "waiting"):
            continue
        own = by_number.get(trial.number, [])
        result = trial_result(trial)
        digest = None if result is None else result.config_digest
        # Of values that have steps MLflow shows the last one; so does this dictionary.
        expected = {} if result is None else {metric.name: metric.value for metric in result_metrics(result)}
        what = _what_differs(state, digest, expected, own)
        if what is not None:
            # A run's params never change: one of another config cannot be corrected, only replaced.
            usable = [run for run in own if run.digest in (None, digest)]
            good = (run for run in usable if _what_differs(state, digest, expected, [run]) is None)
            kept = next(good, usable[0] if usable else None)
            extra = tuple(run.run_id for run in own if kept is None or run.run_id != kept.run_id)
            found.append(Difference(trial.number, what, extra))
    for number, own in by_number.items():
        if number not in known:
            found.append(Difference(number, "is in MLflow but not in Optuna", tuple(run.run_id for run in own)))
    return tuple(sorted(found, key=lambda difference: difference.number))


def _what_differs(state: str, digest: str | None, expected: Mapping[str, float], runs: list[TrialRun]) -> str | None:
    """Say how a trial's runs differ from what Optuna knows of it, or None if they agree."""
    if len(runs) != 1:
        return f"has {len(runs)} MLflow runs instead of one" if runs else "has no MLflow run"
    (run,) = runs
    if (run.status, run.state) != (RUN_STATUS[state], state):
        return f"is {state} in Optuna, but {run.status} with state {run.state} in MLflow"
    if run.digest != digest:
        return f"has config {digest} in Optuna, but {run.digest} in MLflow"
    for name, value in expected.items():
        if not math.isclose(run.metrics.get(name, math.nan), value, rel_tol=1e-9):
            return f"has {name} {value:g} in Optuna, but {run.metrics.get(name)} in MLflow"
    return None
