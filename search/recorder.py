"""What rank 0 tells others about trials: Optuna why one failed, MLflow everything, the runner that the slot is alive.

Optuna is told first, and MLflow never fails a trial (`search.tracking`).
"""

import logging
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hyquant.errors import RankLost
from search.errors import DiskTrouble, StageBug, StoreError, TrialFailed
from search.floor_agreement import agreed_floor
from search.locks import FileLock
from search.logged import floor_metrics
from search.media import written_trial_files
from search.noise_floor import NoiseFloor
from search.objective import Evidence
from search.order import SlotState, WorkOrder, mlflow_lock_path, read_state, write_state
from search.redaction import redacted
from search.retry import DISK_TROUBLE
from search.tracking import Tracker
from search.trials import trial_reason, trial_result, trial_state
from search.workbench import Workbench

logger = logging.getLogger(__name__)

_LOG_LINES = 20


class Recorder:
    """Records the trials of one slot.

    Args:
        study: The study, opened with this worker's storage.
        order: What this slot is to do.
        restart_count: How often torchrun has restarted this slot's workers.
    """

    def __init__(self, study: optuna.Study, order: WorkOrder, *, restart_count: int) -> None:
        self._study = study
        self._order = order
        self._restart_count = restart_count
        self._tracker = Tracker.of(order.store, study, order.tracking)
        self._num_done = read_state(order.folder).num_done
        self._is_tracking = False
        self._has_told_of_float = False

    @property
    def num_done(self) -> int:
        """Return how many trials of this slot have ended, under workers of before as well; no disk refused these."""
        return self._num_done

    def begin(self, number: int) -> None:
        """Show a trial that begins in MLflow, if its database is ready."""
        if self._may_track(wait=False):
            self._tracker.start_trial(number)

    def tell_of_float(self, bench: Workbench) -> None:
        """Write what float videos score and the noise floor into the study, if nobody has; the floor into MLflow."""
        if self._has_told_of_float:
            return
        self._has_told_of_float = True
        if "float_scores" not in self._study.user_attrs:
            scores = {name: result.model_dump(mode="json") for name, result in bench.float_results.items()}
            self._study.set_user_attr("float_scores", scores)
        if bench.floor is not None:
            self.agree_on_floor(bench.floor)
            self._may_track(wait=True)
            self._tracker.log_study(floor_metrics(bench.floor))

    def agree_on_floor(self, own: NoiseFloor | None) -> NoiseFloor | None:
        """Return the noise floor of the study; this slot's own becomes it, if the study has none yet."""
        return agreed_floor(self._study, own, self._order.worker)

    @contextmanager
    def failures_recorded(self, trial: optuna.Trial, stage: Callable[[], str]) -> Iterator[None]:
        """Write into the trial why it failed, whatever the error is, and let the error go on.

        Args:
            trial: The trial in hand.
            stage: Says which stage it is in.

        Raises:
            StageBug: In place of whatever nobody expected, so that nobody takes it for an answer of the store.
        """
        try:
            yield
        except TrialFailed as failure:
            if isinstance(failure, DiskTrouble):
                trial.set_user_attr(DISK_TROUBLE, True)
            _record_failure(trial, failure.stage, failure.reason, failure.log)
            raise
        except (UpdateFinishedTrialError, StoreError, optuna.TrialPruned, RankLost):
            raise  # the trial is not ours any more, cannot be reached, has ended, or is lost with this worker
        except StageBug as bug:
            self._record_bug(trial, bug)
            raise
        except Exception as error:
            found = StageBug(stage(), f"{type(error).__name__}: {error}", log=traceback.format_exc())
            self._record_bug(trial, found)
            raise found from error

    def _record_bug(self, trial: optuna.Trial, bug: StageBug) -> None:
        """Fail a trial for a bug: Optuna hears of it at once, as the other ranks of this slot are about to end."""
        _record_failure(trial, bug.stage, bug.reason, bug.log)
        self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        self._num_done += 1
        self._remember(read_state(self._order.folder).model_copy(update={"num_done": self._num_done}))
        if self._may_track(wait=True):
            reason = redacted(f"stage {bug.stage}: {bug.reason}")
            self._tracker.finish_trial(trial.number, "failed", None, reason=reason)

    def finish(self, trial: FrozenTrial, evidence: Evidence | None) -> None:
        """Log a finished trial to MLflow, and remember that this slot is alive."""
        result, state = trial_result(trial), trial_state(trial)
        self._num_done += DISK_TROUBLE not in trial.user_attrs
        self._may_track(wait=True)
        with _scratch_folder() as folder:
            files = None
            if result is not None and folder is not None:
                plan, report, samples = (e.plan, e.report, e.samples) if (e := evidence) else (None, None, [])
                files = written_trial_files(folder, result, plan=plan, report=report, samples=samples)
            span = (trial.datetime_start, trial.datetime_complete)
            self._tracker.finish_trial(trial.number, state, result, reason=trial_reason(trial), files=files, span=span)
        self.sign_of_life()
        logger.info("trial number=%d state=%s reason=%s", trial.number, state, trial_reason(trial))

    def sign_of_life(self) -> None:
        """Remember that this slot does work, so that deaths of its worker are counted anew."""
        self._remember(SlotState(restarts_at_last_finish=self._restart_count, num_done=self._num_done))

    def _remember(self, state: SlotState) -> None:
        try:
            write_state(self._order.folder, state)
        except OSError as error:
            logger.warning("a slot's state needs room in %s, but: %s; free some", self._order.folder, error)

    def _may_track(self, *, wait: bool) -> bool:
        """Say whether the runner has made MLflow's database, which it does under a lock while the workers start."""
        if not self._is_tracking:
            lock = FileLock(mlflow_lock_path(self._order.store))
            try:
                self._is_tracking = lock.acquire(shared=True, blocking=wait)
                lock.release()
            except StoreError as error:  # a lock file that a full disk does not take
                logger.warning("MLflow's record is completed later: %s", error)
        return self._is_tracking


@contextmanager
def _scratch_folder() -> Iterator[Path | None]:
    """Make a temporary folder for a block; None, after a warning, if the disk does not take even that."""
    try:
        made = tempfile.TemporaryDirectory(prefix="hyq-trial-", ignore_cleanup_errors=True)
    except OSError as error:
        logger.warning("a trial's files need a temporary folder, but: %s; the trial goes without", error)
        yield None
        return
    with made as name:
        yield Path(name)


def _record_failure(trial: optuna.Trial, stage: str, reason: str, log: str) -> None:
    trial.set_user_attr("stage", stage)
    trial.set_user_attr("reason", redacted(f"stage {stage}: {reason}"))
    trial.set_user_attr("log", redacted("\n".join(log.splitlines()[-_LOG_LINES:])))
