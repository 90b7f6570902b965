"""What the runner tells a slot's workers, and what they tell it back: two small values on the border of processes."""

from pathlib import Path

from pydantic import ValidationError

from hyquant.calibration.store import write_atomically
from hyquant.config import FrozenModel

MAX_DEATHS_IN_A_ROW = 3


class WorkOrder(FrozenModel):
    """What the workers of one slot are to do; the only argument of `python -m search.worker`, as JSON.

    Attributes:
        store: Folder of the store.
        url: SQLAlchemy URL of Optuna's database; None is SQLite in the store.
        study: Name of the study.
        slot: Index of the slot, from 0.
        first_trial: Number of trials when the run began; rows of failures before it are not held against this run.
        deadline: Unix time at which no further trial is begun; None for never.
        until_trial: Stop once this trial has finished, whatever the budget; None for a whole study.
    """

    store: Path
    url: str | None
    study: str
    slot: int
    first_trial: int
    deadline: float | None
    until_trial: int | None


class SlotState(FrozenModel):
    """What a slot remembers across restarts of its workers, in `state.json` of its log folder.

    Attributes:
        restarts_at_last_finish: torchrun's restart count when a trial last finished; deaths in a row are counted from
            it.
        stopped: Why the slot stopped before the study was done; None otherwise.
    """

    restarts_at_last_finish: int = 0
    stopped: str | None = None


def slot_folder(store: Path, study: str, slot: int) -> Path:
    """Return where a slot keeps its log and state."""
    return store / "logs" / study / f"slot{slot}"


def mlflow_lock_path(store: Path) -> Path:
    """Return the lock that the runner holds while it makes or repairs MLflow's database."""
    return store / "locks" / "mlflow.lock"


def read_state(folder: Path) -> SlotState:
    """Return the state of a slot; a fresh one if there is none yet."""
    try:
        return SlotState.model_validate_json((folder / "state.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return SlotState()


def write_state(folder: Path, state: SlotState) -> None:
    """Replace the state of a slot."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "state.json", state.model_dump_json().encode())
