"""Watch slots while they work, say what happens, and leave a study in order: what `run` and `worker` have in common."""

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial

from hyquant.memory import give_back
from search.blame import blame_still_workers, blame_within, end_still_workers, taken_from_still_workers
from search.confirmation import confirmations, note_ended_worker
from search.confirming import pending
from search.errors import SearchError, StoreError
from search.interrupts import Interrupts
from search.lease import RENEW_S, LeaseWatch
from search.order import ask_to_leave
from search.processes import this_process
from search.resume import hand_back_trials, reclaim_lost_trials, worker_of
from search.room import cannot_be_written, fullness, trial_shortage
from search.run_sentences import lost_in_words, study_notes, trial_sentence
from search.sharing import drop_dead, member_claims
from search.slots import RunningSlot, SlotSigns, stop_slots
from search.stall import why_over
from search.study import StudyConfig
from search.trials import count_states, front, num_evaluated

POLL_S = 0.5
"""Slots of this process are looked at so often: their processes, and files in their folders."""

EventKind = Literal["created", "resumed", "note", "progress", "trial", "slot_stopped"]


@dataclass(frozen=True)
class RunEvent:
    """Something a watcher may show.

    Attributes:
        kind: What happened.
        message: One sentence; empty for "progress".
        counts: Trials by state, as `search.trials.count_states` gives them.
        budget: Evaluated trials to reach.
        trial: Number of the trial a "trial" event is about.
    """

    kind: EventKind
    message: str
    counts: dict[str, int] = field(default_factory=dict)
    budget: int = 0
    trial: int | None = None


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    Attributes:
        study: Name of the study.
        counts: Trials by state, as `search.trials.count_states` gives them.
        evaluated: How many trials count towards the budget.
        front_size: Members of the front.
        message: What ended it.
        was_asked_to_leave: Whether a signal did, and the study goes on.
    """

    study: str
    counts: dict[str, int]
    evaluated: int
    front_size: int
    message: str
    was_asked_to_leave: bool = False


OnEvent = Callable[[RunEvent], None]


EVERY_TRIALS = 10
"""The artifacts policy is applied after so many trials, and at the end."""


def event(
    kind: EventKind,
    message: str,
    trials: optuna.Study | Iterable[FrozenTrial],
    config: StudyConfig,
    *,
    trial: int | None = None,
) -> RunEvent:
    """Make an event of how the study stands, now or when these trials of it were read."""
    counts = count_states(trials)
    return RunEvent(kind=kind, message=message, counts=counts, budget=config.budget.trials, trial=trial)


def summary_of(study: optuna.Study, message: str, *, was_asked_to_leave: bool = False) -> RunSummary:
    """Sum up how a study stands at the end of a run."""
    counts = count_states(study)
    return RunSummary(
        study=study.study_name,
        counts=counts,
        evaluated=num_evaluated(counts),
        front_size=len(front(study)),
        message=message,
        was_asked_to_leave=was_asked_to_leave,
    )


def watch(
    study: optuna.Study,
    config: StudyConfig,
    slots: Sequence[RunningSlot],
    interrupts: Interrupts,
    on_event: OnEvent,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Report progress until every slot has ended; take back the trials of workers that died.

    The study is read each `RENEW_S` seconds, because all processes of all hosts read it, and at once when a slot here
    has something to tell: a trial has finished, rank 0 has died or begun, the slot has ended.
    """
    watcher = Watcher(study, config, slots, on_event)
    told: list[SlotSigns] = []
    due_s = clock()
    while slots:
        signs = [slot.signs() for slot in slots]
        if signs != told or clock() >= due_s:
            watcher.look()
            told, due_s = signs, clock() + RENEW_S
        if not any(sign.is_running for sign in signs):
            return
        interrupts.wait(POLL_S)


class Watcher:
    """What `run` or `worker` knows of its study and of its slots from one look to the next.

    Args:
        study: The study, opened by this process.
        config: Its config.
        slots: The slots of this process.
        on_event: Told about everything worth showing.
    """

    def __init__(
        self, study: optuna.Study, config: StudyConfig, slots: Sequence[RunningSlot], on_event: OnEvent
    ) -> None:
        self._study, self._config, self._slots, self._on_event = study, config, slots, on_event
        attributes = study.user_attrs
        self._told = set(study_notes(attributes, config)) - {attributes.get("ceiling")}
        self._seen = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
        self._num_kept_to = len(self._seen)
        self._ended: set[int] = set()
        self._was_short = False
        self._leases, self._claims = LeaseWatch(), LeaseWatch()

    def look(self) -> None:
        """See how things stand and do what is to be done: one list of trials, one read of the study's attributes."""
        attributes, trials = self._study.user_attrs, self._study.get_trials(deepcopy=False)
        if not cannot_be_written(Path(self._config.store), self._config.storage):
            if _take_back(self._study, trials, self._slots, self._leases):
                trials = self._study.get_trials(deepcopy=False)
            _look_after_claims(self._study, attributes, self._claims)
        for sentence in study_notes(attributes, self._config):
            if sentence not in self._told:
                self._told.add(sentence)
                self._on_event(event("note", sentence, trials, self._config))
        for slot in self._slots:
            if slot.index not in self._ended and not slot.is_running:
                self._ended.add(slot.index)
                if failure := slot.failure():
                    message = f"slot {slot.index} stopped: {failure}"
                    self._on_event(event("slot_stopped", message, trials, self._config))
        counts = count_states(trials)
        shortage = _shortage(self._config, counts)
        if shortage is not None and not self._was_short:
            self._on_event(event("note", f"waiting for room: {shortage}", trials, self._config))
        self._was_short = shortage is not None
        for trial in trials:
            if trial.state.is_finished() and trial.number not in self._seen:
                self._seen.add(trial.number)
                sentence = trial_sentence(trial, self._config)
                self._on_event(event("trial", sentence, trials, self._config, trial=trial.number))
        if len(self._seen) >= self._num_kept_to + EVERY_TRIALS:
            self._num_kept_to = len(self._seen)
            _keep_policy(self._study, self._config, at_end=False)
        self._on_event(RunEvent("progress", "", counts=counts, budget=self._config.budget.trials))


def _shortage(config: StudyConfig, counts: dict[str, int]) -> str | None:
    """Return what slots wait for on a full disk: to begin a trial, or to write down what the one in hand found out."""
    store = Path(config.store)
    return fullness(store) if counts["running"] else trial_shortage(config, store, num_evaluated(counts))


def _take_back(
    study: optuna.Study, trials: Sequence[FrozenTrial], slots: Sequence[RunningSlot], leases: LeaseWatch
) -> bool:
    """Take lost trials back, mark the configs that ended workers of these slots too often, and end still workers.

    Others look at leases too, and may be first to take a trial from a worker of these slots that stands still.

    Returns:
        Whether any was taken back.
    """
    runner, folders = this_process(), {slot.index: slot.folder for slot in slots}
    blame = blame_within(runner, folders.__getitem__)
    doubtful = leases.doubtful()
    numbers = reclaim_lost_trials(study, leases, blame, trials=trials)
    if not numbers and not doubtful:
        return False
    by_others = taken_from_still_workers(trials, doubtful - {*numbers}, runner)
    blame_still_workers(study, by_others, blame)
    end_still_workers(map(worker_of, [*(trials[number] for number in numbers), *by_others]), runner)
    return bool(numbers)


def _look_after_claims(study: optuna.Study, attributes: Mapping[str, Any], watch: LeaseWatch) -> None:
    """See to workers of this process that measure members of the front again: end who stands still, note who ended.

    Args:
        study: The study.
        attributes: Its own, as they were read last.
        watch: What this process knows of the leases of claims.
    """
    claims = member_claims(attributes)
    for number, claim in drop_dead(study, claims, this_process()):
        note_ended_worker(study, number, claim.worker.key)
    end_still_workers([claims[key].worker for key in watch.stopped(claims)], this_process())


def tidy_up(study: optuna.Study, config: StudyConfig, status: str, on_event: OnEvent) -> None:
    """Take back what was running, make MLflow agree, and log the study's report."""
    from search.report import write_study_report
    from search.tracking import Tracker

    if lost := reclaim_lost_trials(study):
        on_event(event("note", lost_in_words(study.get_trials(deepcopy=False), lost), study, config))
    store = Path(config.store)
    tracker = Tracker.of(store, study, config.tracking)
    correct_mlflow(study, config, on_event)
    for number, confirmation in confirmations(study).items():
        tracker.log_again(number, confirmation)
    try:
        with tempfile.TemporaryDirectory(prefix="hyq-report-") as name:
            write_study_report(Path(name), config, study)
            tracker.finish_study(status, Path(name))
    except OSError as error:
        tracker.finish_study(status, None)
        sentence = (
            f"the study's report needs room in {tempfile.gettempdir()}, but: {error}; free some, then `run` again"
        )
        on_event(event("note", sentence, study, config))
    _keep_policy(study, config, at_end=True)


def _keep_policy(study: optuna.Study, config: StudyConfig, *, at_end: bool) -> None:
    from search.artifacts import apply_policy

    apply_policy(Path(config.store), study, config.artifacts, is_server=config.tracking is not None, at_end=at_end)
    give_back()


def correct_mlflow(study: optuna.Study, config: StudyConfig, on_event: OnEvent) -> None:
    """Make MLflow agree with Optuna, if it answers: a record that cannot be kept now ends no study."""
    from search.repair import repair

    try:
        repaired = repair(Path(config.store), study, config.tracking)
    except StoreError as error:
        on_event(event("note", f"{error} Its MLflow record is completed later", study, config))
        return
    for sentence in repaired.corrected:
        on_event(event("note", f"corrected in MLflow: {sentence}", study, config))
    for sentence in repaired.refused:
        on_event(event("note", f"not corrected in MLflow: {sentence}", study, config))


def leave_at_once(study: optuna.Study, slots: Sequence[RunningSlot], crew: str, interrupts: Interrupts) -> list[int]:
    """Stop slots in the middle of what they do, and hand it back; return the numbers of the trials.

    They are asked to leave first, so that none begins what was just taken from it, and what they had in hand is looked
    at once more when they are gone.
    """
    for slot in slots:
        ask_to_leave(slot.folder)
    left = hand_back_trials(study, crew)
    stop_slots(slots, is_impatient=lambda: interrupts.count > 1)
    return left + hand_back_trials(study, crew)


def is_over(study: optuna.Study, config: StudyConfig) -> bool:
    """Say whether nothing of a study is left to do: no trial, and no member of the front to measure again."""
    return why_over(study, config) is not None and not pending(study, config)


def require_progress(
    study: optuna.Study, config: StudyConfig, slots: Sequence[RunningSlot], until_trial: int | None
) -> None:
    """Refuse to call a study done whose slots all stopped before the budget was used."""
    failures = [failure for slot in slots if (failure := slot.failure())]
    if until_trial is None and failures and not is_over(study, config):
        raise SearchError(f"study {config.name} stopped early: {failures[0]}")
    if until_trial is not None and failures:
        raise SearchError(f"trial {until_trial} was not run: {failures[0]}")
