"""Run a study: own its databases, start its slots, watch, tidy up. `run_study` and `run_point` are what the commands
call.

One runner per study at a time (a file lock). The runner creates databases before a worker needs them, takes lost
trials back, makes MLflow agree with Optuna at the start and at the end, and leaves no process behind.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import optuna

from hyquant.config import QuantConfig
from search.addresses import require_plain_address
from search.confirming import pending
from search.errors import SearchError, StoreError
from search.interrupts import counted_interrupts
from search.locks import FileLock
from search.mlflow_client import require_undamaged
from search.order import WorkOrder, mlflow_lock_path
from search.parts import require_parts, require_places
from search.prompts import load_heldout_prompts, load_prompts
from search.proposal import enqueue_point, enqueue_presets
from search.representable import guidance_note
from search.resume import queue_forgotten_trials, reclaim_lost_trials, require_same_study
from search.room import run_shortage
from search.run_sentences import lost_in_words, numbers_in_words
from search.sensitivity import with_measured_ladder
from search.slots import RunningSlot, start_slots, stop_slots
from search.stall import USED_UP, why_over
from search.storage import (
    create_study,
    open_study,
    require_space,
    store_config,
    store_errors,
    stored_config,
    stored_prompts,
    study_names,
)
from search.study import Slot, StudyConfig
from search.trials import count_states, num_evaluated, unfinished
from search.watching import (
    OnEvent,
    RunSummary,
    correct_mlflow,
    event,
    leave_at_once,
    require_progress,
    summary_of,
    tidy_up,
    watch,
)
from spaces.space import LADDER, with_ladder
from spaces.targets import left_out


def run_study(config: StudyConfig, *, study_file: Path | None, on_event: OnEvent) -> RunSummary:
    """Create a study or go on with it until its budget is used.

    Args:
        config: The study, from `load_study`.
        study_file: Where it was read from; prompt files are relative to it. None goes on with a stored study by its
            name, with the prompts that are stored.
        on_event: Told about everything worth showing, on the calling thread.

    Raises:
        SearchError: If the study cannot start, belongs to another file, is being run by somebody else, or cannot go on.
        ConfigError: If prompts are missing or overlap.
        KeyboardInterrupt: On Ctrl-C, after the slots were stopped and the running trials were queued again.
    """
    with _opened(config, study_file, on_event) as (study, config):
        added = enqueue_presets(study, config)
        if added:
            for what, reason in left_out(config.space, config.target).items():
                on_event(event("note", f"left out {what}: {reason}", study, config))
            on_event(event("note", f"queued the {added} presets of space {config.space.name}", study, config))
        if short := run_shortage(config, Path(config.store), num_evaluated(count_states(study))):
            on_event(event("note", short, study, config))
        before = why_over(study, config)
        is_done = before is not None and not pending(study, config)
        # Without slots what remains is to tidy up, which a run that was killed at its very end has not done.
        slots = () if is_done else config.slots
        _run_slots(study, config, slots, until_trial=None, on_event=on_event)
        if is_done and before == USED_UP:
            return summary_of(study, f"the budget of {config.budget.trials} evaluated trials was already used")
        after = why_over(study, config)
        if after is None and config.budget.time_s is None:
            return summary_of(study, "its slots left with trials to come; start `hyq-search run` again")
        return summary_of(study, "done" if after in (None, USED_UP) else f"done, as {after}")


def run_point(config: StudyConfig, point: QuantConfig, *, study_file: Path | None, on_event: OnEvent) -> int:
    """Evaluate one hand-written config as a trial of the study and return its number; presets are not queued.

    Raises:
        SearchError: As `run_study`.
        ConfigError: As `run_study`.
    """
    with _opened(config, study_file, on_event) as (study, config):
        number = enqueue_point(study, point)
        on_event(event("note", f"queued the config as trial {number}", study, config))
        _run_slots(study, config, config.slots[:1], until_trial=number, on_event=on_event)
        return number


@contextmanager
def _opened(
    config: StudyConfig, study_file: Path | None, on_event: OnEvent
) -> Iterator[tuple[optuna.Study, StudyConfig]]:
    """Hold the study as its only runner, created or taken up again; its config has the ladder that its space wants."""
    optuna.logging.disable_default_handler()
    require_places(config.shared, config.tracking)
    if config.storage is not None:
        require_plain_address(config.storage)
    store = Path(config.store)
    if study_file is None:
        prompts = stored_prompts(open_study(store, config.name, url=config.storage))
    else:
        prompts = load_prompts(config.workload, study_file.parent)
        if config.certificate is not None:
            load_heldout_prompts(config.certificate, study_file.parent, prompts)  # refused before days of search
    require_space(store)
    lock = FileLock(store / "locks" / f"{config.name}.runner.lock")
    if not lock.acquire(blocking=False):
        raise SearchError(
            f"a study has one runner at a time, but study {config.name!r} in {store} is being run by another process; "
            f"wait for it or stop it"
        )
    try:
        with store_errors(store):
            if config.tracking is None:
                require_undamaged(store)
            if config.name not in study_names(store, url=config.storage):
                require_parts(config)
            config = with_measured_ladder(_with_stored_ladder(config), prompts)
            study, is_new = create_study(store, config, prompts, url=config.storage)
            if is_new:
                on_event(event("created", f"created study {config.name} in {store}", study, config))
                if note := guidance_note(config):
                    on_event(event("note", note, study, config))
            else:
                require_same_study(study, config, prompts)
                _take_up(study, config, on_event)
            yield study, config
    finally:
        lock.release()


def _with_stored_ladder(config: StudyConfig) -> StudyConfig:
    """Return a config with the ladder that its study was created with, so that a map measured since changes nothing."""
    try:
        ladder = stored_config(open_study(Path(config.store), config.name, url=config.storage)).space.ladder
    except StoreError:  # it is not there yet
        return config
    if ladder is None or config.space.exclusions != LADDER:
        return config
    return config.model_copy(update={"space": with_ladder(config.space, ladder)})


def _take_up(study: optuna.Study, config: StudyConfig, on_event: OnEvent) -> None:
    """Go on with a stored study: take over a changed budget, and take back trials whose worker is dead."""
    if stored_config(study) != config.without_places():
        store_config(study, config)
    lost = queue_forgotten_trials(study) + reclaim_lost_trials(study)
    evaluated = num_evaluated(count_states(study))
    message = f"resumed study {config.name} with {evaluated} of {config.budget.trials} trials evaluated"
    if lost:
        message += f"; {lost_in_words(study.get_trials(deepcopy=False), lost)}"
    on_event(event("resumed", message, study, config))


def _run_slots(
    study: optuna.Study, config: StudyConfig, slots: Sequence[Slot], *, until_trial: int | None, on_event: OnEvent
) -> None:
    """Start slots, watch them to their end, and tidy up however it comes; if none could start, nothing has changed."""
    store = Path(config.store)
    trials = study.get_trials(deepcopy=False)
    order = WorkOrder(
        store=store.resolve(),
        url=config.storage,
        tracking=config.tracking,
        shared=None if config.shared is None else Path(config.shared).resolve(),
        study=config.name,
        slot=0,
        first_trial=len(trials),
        unfinished=unfinished(trials),
        deadline=None if config.budget.time_s is None else time.monotonic() + config.budget.time_s,
        until_trial=until_trial,
    )
    running: list[RunningSlot] = []
    has_started, status = False, "FAILED"
    with counted_interrupts() as interrupts:
        try:
            with FileLock(mlflow_lock_path(store)).held():
                running = start_slots(slots, order, device=config.model.device)
                _open_tracking(study, config, on_event)
                has_started = True
            watch(study, config, running, interrupts, on_event)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            if left := leave_at_once(study, running, order.crew, interrupts):
                message = f"{numbers_in_words(left)} interrupted; queued again for the next run"
                on_event(event("note", message, study, config))
            raise
        finally:
            stop_slots(running, is_impatient=lambda: interrupts.count > 1)
            if has_started:
                tidy_up(study, config, status, on_event)
    require_progress(study, config, running, until_trial)


def _open_tracking(study: optuna.Study, config: StudyConfig, on_event: OnEvent) -> None:
    """Make MLflow's database ready while the workers start; mlflow is imported here, when they are under way."""
    from search.mlflow_client import prepare_store
    from search.tracking import Tracker

    store = Path(config.store)
    tracker = Tracker.of(store, study, config.tracking)
    if config.tracking is None:
        prepare_store(store)
        tracker.open_study(config.without_places())
    else:
        tracker.start_study(config.without_places())  # a server that is away is no reason not to start
    correct_mlflow(study, config, on_event)
