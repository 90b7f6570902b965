"""What the runner tells a slot's workers, and what they tell it back: small values on the border of processes.

The order goes through the environment and not through the command line, which every user of the host may read: the
address of a database holds a password.
"""

from pathlib import Path

from pydantic import ConfigDict, ValidationError

from hyquant.calibration.store import write_atomically
from hyquant.config import FrozenModel, digest
from search.processes import ProcessId, WorkerId, this_process, this_worker

MAX_DEATHS_IN_A_ROW = 3
ORDER_VARIABLE = "HYQ_WORK_ORDER"


class WorkOrder(FrozenModel):
    """What the workers of one slot are to do, as JSON in the environment variable `HYQ_WORK_ORDER`.

    Attributes:
        store: Folder of the store on this host.
        url: Address of Optuna's database (`search.databases`); None is SQLite in the store.
        tracking: MLflow's address; None is the store's own.
        shared: Folder through which cache entries reach other hosts; None for none.
        study: Name of the study.
        crew: "" for the slots of `run`; the name of a joined worker, unique in the study, for those of `worker`.
        runner: The process that started the slot, and takes back what its workers lose.
        slot: Index of the slot, from 0.
        first_trial: Number of trials when the run began; rows of failures before it are not held against this run.
        unfinished: Trials of before that had not finished then, such as queued presets; their failures are this run's.
        deadline: Monotonic time of this host (seconds) at which no further trial is begun; None for never.
        until_trial: Stop once this trial has finished, whatever the budget; None for a whole study.
        max_trials: Leave after so many trials of this slot; None for no limit.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    store: Path
    url: str | None
    tracking: str | None = None
    shared: Path | None = None
    study: str
    crew: str = ""
    runner: ProcessId | None = None
    slot: int
    first_trial: int
    unfinished: tuple[int, ...] = ()
    deadline: float | None
    until_trial: int | None
    max_trials: int | None = None

    @property
    def folder(self) -> Path:
        """Return where this slot keeps its log and state."""
        return slot_folder(self.store, self.study, self.slot, crew=self.crew)

    def is_out_of_time(self, *, now: float) -> bool:
        """Say whether the deadline has come by a monotonic time of this host, in seconds."""
        return self.deadline is not None and now >= self.deadline

    @property
    def worker(self) -> WorkerId:
        """Return the identity of this process as the worker that has the order."""
        return this_worker(self.slot, crew=self.crew, runner=self.runner)

    @property
    def lane(self) -> int:
        """Return a number that no other slot of the study has, on no host: samplers draw by it."""
        return self.slot if not self.crew else int(digest([self.crew, self.slot], length=8), 16)


class SlotState(FrozenModel):
    """What a slot remembers across restarts of its workers, in `state.json` of its log folder.

    Attributes:
        restarts_at_last_finish: torchrun's restart count when a trial last finished; deaths in a row are counted from
            it.
        num_done: Trials of this slot that have ended, under all its workers so far.
        forgiven: Deaths since then that a marked config is to blame for (`search.poison`).
        stopped: Why the slot stopped before the study was done; None otherwise.
    """

    restarts_at_last_finish: int = 0
    num_done: int = 0
    forgiven: int = 0
    stopped: str | None = None


def slot_folder(store: Path, study: str, slot: int, *, crew: str = "") -> Path:
    """Return where a slot keeps its log and state."""
    return store / "logs" / study / crew / f"slot{slot}"


def mlflow_lock_path(store: Path) -> Path:
    """Return the lock that the runner holds while it makes or repairs MLflow's database."""
    return store / "locks" / "mlflow.lock"


def read_state(folder: Path) -> SlotState:
    """Return the state of a slot; a fresh one if there is none yet."""
    try:
        return SlotState.model_validate_json((folder / "state.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return SlotState()


def write_state(folder: Path, state: SlotState) -> None:
    """Replace the state of a slot."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "state.json", state.model_dump_json().encode())


def told_ns(folder: Path) -> int:
    """Return when a slot's state was last written, in the file system's nanoseconds; 0 if never."""
    try:
        return (folder / "state.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def read_worker(folder: Path) -> ProcessId | None:
    """Return which process last began to work as rank 0 of a slot; None if there was none."""
    try:
        return ProcessId.model_validate_json((folder / "worker.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write_worker(folder: Path) -> None:
    """Say that this process is rank 0 of a slot now, so that its runner sees it die."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "worker.json", this_process().model_dump_json().encode())


def ask_to_leave(folder: Path) -> None:
    """Tell a slot to finish the trial in hand and begin no other."""
    (folder / "leave").touch()


def is_asked_to_leave(folder: Path) -> bool:
    """Say whether a slot is to begin no further trial."""
    return (folder / "leave").exists()
