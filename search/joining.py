"""Join a study that is there: more slots, from any host, without owning anything.

A joined worker opens what exists and creates nothing. Config and prompts come from the storage, where their digests are
checked; the model must be the study's, which every slot checks by its fingerprint before its first trial. It takes lost
trials back like everyone else. What ends a study (MLflow put right, the report) is done by whoever sees the study over
with nothing in flight, `run` or a worker; doing it twice does no harm.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna

from hyquant.config import digest
from search.errors import SearchError, StoreError
from search.interrupts import Leaving, counted_interrupts
from search.locks import FileLock
from search.order import WorkOrder, ask_to_leave
from search.parts import require_places
from search.processes import this_worker
from search.prompts import load_prompts
from search.resume import reclaim_lost_trials, require_same_study
from search.run_sentences import numbers_in_words
from search.slot_devices import read_layout
from search.slots import RunningSlot, start_slots, stop_slots
from search.storage import open_study, require_intact, require_space, store_errors, stored_config
from search.study import Slot, StudyConfig
from search.trials import count_states, unfinished
from search.watching import (
    OnEvent,
    RunSummary,
    event,
    is_over,
    leave_at_once,
    require_progress,
    summary_of,
    tidy_up,
    watch,
)

MAX_CREWS = 1000
NO_RECORD = (
    "no MLflow is known here, so trials reach it without their videos when `hyq-search run` goes on; "
    "give --tracking-uri to log them from here"
)


def join_study(
    place: StudyConfig | str,
    *,
    store: Path,
    url: str | None,
    tracking: str | None = None,
    shared: Path | None = None,
    study_file: Path | None = None,
    slots: tuple[Slot, ...] = (Slot(),),
    max_trials: int | None = None,
    is_hasty: bool = False,
    on_event: OnEvent,
) -> RunSummary:
    """Work on a stored study until it is over, so many trials are done, or a signal asks to leave.

    The first signal lets the trials in hand be finished; the second hands them back, queued as if never begun.

    Args:
        place: The study's name, or its config from a study file, which must be the stored one.
        store: Folder of this host for cache, logs and locks.
        url: Address of the database; None is SQLite in the store.
        tracking: MLflow's address; None is the store's own.
        shared: Folder through which cache entries reach other hosts.
        study_file: Where the config was read from.
        slots: Slots of this host.
        max_trials: Leave after so many trials of each slot.
        is_hasty: Whether the first signal hands back already.
        on_event: Told about everything worth showing, on the calling thread.

    Raises:
        StoreError: If the study is not there or is damaged.
        SearchError: If a slot cannot work: another model, missing weights.
        KeyboardInterrupt: After trials were handed back.
    """
    optuna.logging.disable_default_handler()
    name = place if isinstance(place, str) else place.name
    with store_errors(store):
        require_space(store)
        study = open_study(store, name, url=url)
        require_intact(study)
        require_places(shared, tracking)
        if isinstance(place, StudyConfig) and study_file is not None:
            require_same_study(study, place, load_prompts(place.workload, study_file.parent))
        here = {"store": str(store), "storage": url, "tracking": tracking, "slots": slots}
        config = stored_config(study).model_copy(update=here)
        with _crew(store, name) as crew:
            if is_over(study, config):
                return summary_of(study, "the study is over already")
            trials = study.get_trials(deepcopy=False)
            order = WorkOrder(
                store=store.resolve(),
                url=url,
                tracking=tracking,
                shared=shared,
                study=name,
                crew=crew,
                slot=0,
                first_trial=len(trials),
                unfinished=unfinished(trials),
                deadline=None,
                until_trial=None,
                max_trials=max_trials,
            )
            return _work(study, config, order, is_hasty=is_hasty, on_event=on_event)


def _work(
    study: optuna.Study, config: StudyConfig, order: WorkOrder, *, is_hasty: bool, on_event: OnEvent
) -> RunSummary:
    running: list[RunningSlot] = []

    def leave() -> None:
        on_event(event("note", "finishing the trials in hand; once more hands them back", study, config))
        for slot in running:
            ask_to_leave(slot.folder)

    on_event(event("resumed", f"joined study {config.name} as {order.crew}", study, config))
    if not _has_record(order):
        on_event(event("note", NO_RECORD, study, config))
    with counted_interrupts(Leaving(leave, is_hasty=is_hasty)) as interrupts:
        try:
            running = start_slots(config.slots, order, device=config.model.device)
            watch(study, config, running, interrupts, on_event)
        except KeyboardInterrupt:
            if handed_back := leave_at_once(study, running, order.crew, interrupts):
                on_event(event("note", f"{numbers_in_words(handed_back)} handed back", study, config))
            raise
        finally:
            stop_slots(running, is_impatient=lambda: interrupts.count > 1)
            reclaim_lost_trials(study)
        if is_over(study, config) and not count_states(study)["running"]:
            if _has_record(order):
                _leave_in_order(study, config, on_event)
            return summary_of(study, "done")
        if interrupts.count == 0:
            require_progress(study, config, running, None)
        return summary_of(study, "left; the study goes on", was_asked_to_leave=interrupts.count > 0)


def _has_record(order: WorkOrder) -> bool:
    """Say whether MLflow is to be found from here: a server, or a database in this host's store."""
    from search.mlflow_client import database_path

    return order.tracking is not None or database_path(order.store).is_file()


def _leave_in_order(study: optuna.Study, config: StudyConfig, on_event: OnEvent) -> None:
    """Put MLflow right, if it answers and knows the study; the work itself is done, and `run` can do this later."""
    try:
        tidy_up(study, config, "FINISHED", on_event)
    except StoreError as error:
        on_event(event("note", f"left to `hyq-search run`: {error}", study, config))


@contextmanager
def _crew(store: Path, study: str) -> Iterator[str]:
    """Hold a name for this worker that no other of the study has now, on no host; names are used again.

    Hosts may have one name, and one host several stores: their kernel and the store's path tell them apart.
    """
    here = this_worker(0)
    place = digest([str(store.resolve()), here.kernel], length=6)
    for index in range(MAX_CREWS):
        crew = f"{here.host}-{place}-{index}"
        lock = FileLock(store / "locks" / f"{study}.{crew}.lock")
        if lock.acquire(blocking=False):
            try:
                yield crew
            finally:
                lock.release()
            return
    raise StoreError(f"a host has at most {MAX_CREWS} workers of a study, but {store} has as many; end some")


def slots_of(text: str | None) -> tuple[Slot, ...]:
    """Return the slots that a layout such as "2 x 4" means: two slots of four ranks, each with devices of its own.

    None is one rank that names no device, so that several workers may share what is visible.

    Raises:
        SearchError: If it is no layout.
    """
    if text is None:
        return (Slot(),)
    try:
        return tuple(Slot.model_validate(slot) for slot in read_layout(text))
    except ValueError as error:
        raise SearchError(str(error)) from error
