"""The MLflow record of a study: one parent run for the study, one child run per trial, in the store or on a server.

MLflow is a record, not the truth (Optuna is). What is to be logged is written into the store's spool first and sent
from there (`search.spool`): MLflow that does not answer is warned about once, asked again ever more rarely, and never
fails or holds up a trial. `search.repair` makes up for what is missing in the end.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from search.errors import StoreError
from search.logged import LoggedMetric
from search.mlflow_client import Refused, connect, database_path, log_batches, log_params, mlflow_errors
from search.result import TrialResult
from search.run_log import (
    PARENT_TAG,
    STATE_TAG,
    TRIAL_TAG,
    RunLog,
    Span,
    again_log,
    study_log,
    trial_log,
)
from search.spool import Spool, Spooled
from search.storage import study_id
from search.study_run import (
    OtherStudy,
    StudyIds,
    TrialRun,
    find_or_make_study_run,
    find_study_run,
    first_run,
    known_study_run,
    log_first_params,
    trial_runs,
    trial_runs_among,
)

if TYPE_CHECKING:
    import optuna

    from search.confirmation import Confirmation
    from search.mlflow_client import Client, Run
    from search.study import StudyConfig

logger = logging.getLogger(__name__)

RETRY_S, MAX_RETRY_S = 30.0, 600.0
"""After a failure nothing is sent for so long, then one log is tried; each failure in a row doubles it."""


class Tracker:
    """Logs one study; made in the runner and in every worker's rank 0.

    Args:
        store: Folder of the store, with the spool; `prepare_store` was called on it if there is no `uri`.
        study: The study's name, which is also the name of the MLflow experiment.
        uri: Address of an MLflow server; None is the store's own database.
        clock: Seconds that never go back.
        study_id: Tells the study from others of its name; None for studies of old, which have no id.
    """

    def __init__(
        self,
        store: Path,
        study: str,
        uri: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        study_id: str | None = None,
    ) -> None:
        self._store = store
        self._study = study
        self._study_id = study_id
        self._uri = uri
        self._clock = clock
        self._spool = Spool(store, study)
        self._open_client: Client | None = None
        self._ids: StudyIds | None = None
        self._silent_until = 0.0
        self._silence_s = RETRY_S
        self._has_warned = False

    @classmethod
    def of(cls, store: Path, study: "optuna.Study", uri: str | None = None) -> "Tracker":
        """Return what logs a stored study, and no other one of its name."""
        return cls(store, study.study_name, uri, study_id=study_id(study))

    def open_study(self, config: "StudyConfig") -> str:
        """Find or create the study's experiment and parent run, mark it running, and return the parent's run id.

        Raises:
            StoreError: If MLflow does not answer, or has another study of this name.
        """
        with tempfile.TemporaryDirectory(prefix="hyq-study-") as name:
            self.send(study_log(config), _with_study_file(Path(name), config))
        return self._study_ids().run_id

    def start_study(self, config: "StudyConfig") -> None:
        """Do what `open_study` does, now or, if MLflow does not answer, when it does.

        Raises:
            OtherStudy: If MLflow has another study of this name.
        """
        try:
            self._attempt(self._made_ids)
        except Refused as refusal:
            self._warn(str(refusal))
        with tempfile.TemporaryDirectory(prefix="hyq-study-") as name:
            self._log("open", study_log(config), _with_study_file(Path(name), config))

    def start_trial(self, number: int) -> None:
        """Create the trial's child run in status RUNNING, if MLflow answers; `finish_trial` does it otherwise."""
        try:
            self._attempt(lambda: self._create_run(number, None))
        except (Refused, OtherStudy) as refusal:
            self._warn(str(refusal))

    def finish_trial(
        self,
        number: int,
        state: str,
        result: TrialResult | None,
        *,
        reason: str | None = None,
        files: Path | None = None,
        span: Span = (None, None),
    ) -> None:
        """Log everything about a finished trial and end its run; doing it twice changes nothing.

        Args:
            number: The trial's number.
            state: A key of `RUN_STATUS`.
            result: What the trial found out; None if it did not get that far.
            reason: Why it failed, stopped or is infeasible.
            files: Folder whose files become the run's artifacts.
            span: When it began and ended.
        """
        self._log(f"trial-{number}", trial_log(number, state, result, reason=reason, span=span), files)

    def log_study(self, metrics: Sequence[LoggedMetric]) -> None:
        """Log numbers of the study itself to its parent run; doing it twice changes nothing."""
        self._log("study", RunLog(number=None, metrics=tuple(metrics)))

    def log_again(self, number: int, confirmation: "Confirmation") -> None:
        """Log what measuring a member of the front again has shown, as `again.NAME`; doing it twice changes nothing."""
        self._log(f"again-{number}", again_log(number, confirmation))

    def finish_study(self, status: str, files: Path | None) -> None:
        """End the parent run as "FINISHED", "KILLED" or "FAILED" and log the study's report files."""
        self._log("report", RunLog(number=None, status=status), files)

    def deliver(self) -> int:
        """Send what waits in the spool, oldest first, unless MLflow is known to be away; return how many remain.

        What MLflow refuses for good and what is damaged is set aside there (`Spool.aside`). What waits for a server
        is not sent to the store's own database.
        """
        with self._spool.sending() as is_ours:
            if is_ours:
                self._spool.sweep()
                for spooled in self._spool.waiting():
                    if not self._deliver_one(spooled):
                        break
        return sum(1 for _ in self._spool.waiting())

    def send(self, log: RunLog, files: Path | None = None) -> None:
        """Log to MLflow now; doing it twice changes nothing. The run ends before its files go, which may fail alone.

        Raises:
            StoreError: If MLflow does not answer or does not take it.
        """
        with mlflow_errors(self._store, self._uri):
            if log.number is None:
                run_id, timestamp_ms = self._made_ids().run_id, 0
                log_first_params(self._client, run_id, log.params, self._store, self._uri)
            else:
                run = self._find_trial_run(log.number) or self._create_run(log.number, log.started_ms)
                run_id, timestamp_ms = str(run.info.run_id), int(run.info.start_time)
                log_params(self._client, run_id, log.params)
            log_batches(self._client, run_id, log.metrics, log.tags, timestamp_ms)
            if log.status == "RUNNING":
                self._client.update_run(run_id, status="RUNNING")
            elif log.status is not None:
                self._client.set_terminated(run_id, log.status, end_time=log.finished_ms)
            if files is not None:
                self._client.log_artifacts(run_id, str(files))

    def knows_study(self) -> bool:
        """Say whether MLflow has the study.

        Raises:
            StoreError: If MLflow does not answer.
        """
        with mlflow_errors(self._store, self._uri):
            return find_study_run(self._client, self._study, self._study_id) is not None

    def trial_runs(self) -> tuple[TrialRun, ...]:
        """Return every child run of the study, oldest first.

        Raises:
            StoreError: If MLflow does not answer.
        """
        with mlflow_errors(self._store, self._uri):
            return tuple(trial_runs(self._client, self._study_ids()))

    def trial_numbers(self, run_ids: Collection[str]) -> dict[str, int]:
        """Return the trial's number of each of these runs that is a child run of the study.

        Raises:
            StoreError: If MLflow does not answer.
        """
        with mlflow_errors(self._store, self._uri):
            found = trial_runs_among(self._client, self._study_ids(), run_ids)
            return {run.run_id: run.number for run in found}

    def tag(self, run_id: str, name: str, text: str) -> None:
        """Write a tag of a run.

        Raises:
            StoreError: If MLflow does not answer.
        """
        with mlflow_errors(self._store, self._uri):
            self._client.set_tag(run_id, name, text)

    def delete_run(self, run_id: str) -> None:
        """Take a run out of the record (MLflow keeps it restorable).

        Raises:
            StoreError: If MLflow does not answer.
        """
        with mlflow_errors(self._store, self._uri):
            self._client.delete_run(run_id)

    @property
    def _client(self) -> "Client":
        if self._open_client is None:
            self._open_client = connect(self._store, self._uri)
        return self._open_client

    @property
    def _is_silent(self) -> bool:
        return self._clock() < self._silent_until

    def _deliver_one(self, spooled: Spooled) -> bool:
        """Send one log, set it aside, or leave it to its server; False if those behind it cannot be sent either."""
        if spooled.log.is_for_server and self._uri is None:
            self._warn(
                f"{spooled.folder} must go to the study's MLflow server, but none is given; give --tracking-uri."
            )
            return True
        try:
            is_sent = self._attempt(lambda: self.send(spooled.log, spooled.files))
        except OtherStudy as error:
            self._warn(str(error))
            return False
        except Refused as refusal:
            logger.warning("set aside in %s: %s", self._spool.folder, refusal)
            self._spool.set_aside(spooled.folder, str(refusal))
            return True
        if is_sent:
            self._spool.remove(spooled.folder)
        return is_sent

    def _log(self, label: str, log: RunLog, files: Path | None = None) -> None:
        """Write a log to the spool and send what lies there; nothing is kept for a store without MLflow."""
        if self._uri is None and not database_path(self._store).is_file():
            self._attempt(lambda: self._client)
            return
        try:
            self._spool.add(label, log.model_copy(update={"is_for_server": self._uri is not None}), files)
        except OSError as error:
            self._warn(f"the spool must take what MLflow is to get, but {self._spool.folder} gave '{error}'.")
            return
        try:
            self.deliver()
        except StoreError as error:  # a lock file that a full disk does not take
            self._warn(str(error))

    def _attempt(self, action: Callable[[], object]) -> bool:
        """Do something with MLflow and say whether it worked; after it did not answer, do nothing for a while.

        Raises:
            Refused: If MLflow answers, but will never take this.
            OtherStudy: If it has another study of this name.
        """
        if self._is_silent:
            return False
        try:
            with mlflow_errors(self._store, self._uri):
                action()
        except (Refused, OtherStudy):
            raise
        except StoreError as error:
            self._warn(str(error))
            self._silent_until = self._clock() + self._silence_s
            self._silence_s = min(2.0 * self._silence_s, MAX_RETRY_S)
            return False
        self._silence_s = RETRY_S
        return True

    def _warn(self, sentence: str) -> None:
        if not self._has_warned:
            logger.warning("%s The study goes on; its MLflow record is completed later.", sentence)
        self._has_warned = True

    def _study_ids(self) -> StudyIds:
        """Return where the study is in MLflow; makes nothing."""
        if self._ids is None:
            self._ids = known_study_run(self._client, self._study, self._study_id, self._store, self._uri)
        return self._ids

    def _made_ids(self) -> StudyIds:
        """Return where the study is in MLflow, made by whoever is first."""
        if self._ids is None:
            self._ids = find_or_make_study_run(self._client, self._study, self._study_id, self._store, self._uri)
        return self._ids

    def _find_trial_run(self, number: int) -> "Run | None":
        experiment_id, parent_id = self._made_ids()
        condition = f"tags.`{PARENT_TAG}` = '{parent_id}' AND tags.`{TRIAL_TAG}` = '{number}'"
        return first_run(self._client, experiment_id, condition)

    def _create_run(self, number: int, started_ms: int | None) -> "Run":
        experiment_id, parent_id = self._made_ids()
        tags = {PARENT_TAG: parent_id, TRIAL_TAG: str(number), STATE_TAG: "running"}
        return self._client.create_run(experiment_id, started_ms, tags, run_name=f"trial {number}")


def _with_study_file(folder: Path, config: "StudyConfig") -> Path:
    text = yaml.safe_dump(config.stored_form(), sort_keys=False)
    (folder / "study.yaml").write_text(text, encoding="utf-8")
    return folder
