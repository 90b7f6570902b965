"""The MLflow record of a study: one parent run for the study, one child run per trial. The only importer of mlflow.

The store is a folder: `mlflow.db` (SQLite, write-ahead log) and `artifacts/`. `prepare_store` creates the database and
is called by the runner alone, because two processes that create it crash each other; everyone else finds it ready.

MLflow is a record, not the truth (Optuna is): what cannot be logged is warned about once and made up for by
`search.repair`, and never fails a trial.
"""

import logging
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from search.errors import StoreError
from search.logged import LoggedMetric, config_params, flatten, result_metrics
from search.result import TrialResult

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from search.confirmation import Confirmation
    from search.study import StudyConfig

logger = logging.getLogger(__name__)

STUDY_TAG, TRIAL_TAG, STATE_TAG = "hyq.study", "hyq.trial", "hyq.state"
DIGEST_TAG, REASON_TAG, REPAIRED_TAG = "hyq.config_digest", "hyq.reason", "hyq.repaired"
AGAIN_TAG, STOPPED_TAG = "hyq.measured_again", "hyq.stopped_by"
LATENCY_TAG, MEASUREMENT_TAG = "hyq.latency", "hyq.measurement_error"
PARENT_TAG = "mlflow.parentRunId"  # the tag by which the MLflow UI nests runs

RUN_STATUS = {
    "running": "RUNNING",
    "complete": "FINISHED",
    "infeasible": "FINISHED",
    "reused": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
}
"""MLflow's run status for each state of a trial; a waiting trial has no run."""

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI's page for runs, not for chat models
_NOTE = (
    "A study of hyq-search. Under Artifacts: the front as `front.html` and `front.png`, what decides about each "
    "objective as `importances.png`, all trials as `trials.md`. Each nested run is a trial: its `videos.mp4` and "
    "`strip.png` show float and quantized side by side."
)

_MAX_METRICS, _MAX_PARAMS = 1000, 100  # per batch: limits of MLflow's REST API, "Log Batch"


def database_path(store: Path) -> Path:
    """Return where a store keeps its MLflow database."""
    return store / "mlflow.db"


def tracking_uri(store: Path) -> str:
    """Return the URI under which MLflow finds a store."""
    return f"sqlite:///{database_path(store).resolve()}"


def prepare_store(store: Path) -> None:
    """Create a store's folder and MLflow database, or check that the existing one can be written.

    Raises:
        StoreError: If the folder or database cannot be written, is locked, or was made by another MLflow version.
    """
    path = database_path(store)
    try:
        (store / "artifacts").mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=5.0)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    except (OSError, sqlite3.Error) as error:
        raise StoreError(
            f"the MLflow database must be writable, but {path} gave '{error}'; "
            "close the program that holds it, free disk space, or give another store in the study file."
        ) from error
    with _store_errors(store):
        _connect(store)  # an empty database is migrated here


def _connect(store: Path) -> "MlflowClient":
    """Return a client of an existing database; MLflow's usage pings and its chatter are switched off."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    if not database_path(store).is_file():
        raise StoreError(f"a store must hold mlflow.db, but {store} does not; start the study with hyq-search run.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # MLflow's own, about how it uses SQLAlchemy
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors reach us as exceptions
        return MlflowClient(tracking_uri=tracking_uri(store))


@contextmanager
def _store_errors(store: Path) -> Iterator[None]:
    """Turn what MLflow, SQLAlchemy and the disk raise into one StoreError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise StoreError(
            f"the MLflow store {store} must answer, but gave '{first_line}'; run again when it is free "
            f"(after an upgrade of MLflow: mlflow db upgrade {tracking_uri(store)})."
        ) from error


@dataclass(frozen=True)
class TrialRun:
    """What MLflow holds of one trial: its child run, without artifacts."""

    run_id: str
    number: int
    status: str
    state: str | None
    digest: str | None
    metrics: dict[str, float]


class Tracker:
    """Logs one study to its store; made in the runner and in every worker's rank 0.

    Args:
        store: Folder of the store; `prepare_store` was called on it.
        study: The study's name, which is also the name of the MLflow experiment.
    """

    def __init__(self, store: Path, study: str) -> None:
        self._store = store
        self._study = study
        self._open_client: MlflowClient | None = None
        self._ids: tuple[str, str] | None = None
        self._has_warned = False

    def open_study(self, config: "StudyConfig") -> str:
        """Find or create the study's experiment and parent run, mark it running, and return the parent's run id.

        Raises:
            StoreError: If the store does not answer.
        """
        with _store_errors(self._store):
            client = self._client
            experiment = client.get_experiment_by_name(self._study)
            location = (self._store / "artifacts").resolve().as_uri()
            experiment_id = (
                client.create_experiment(self._study, artifact_location=location, tags=_EXPERIMENT_TAGS)
                if experiment is None
                else experiment.experiment_id
            )
            parent = self._find_run(experiment_id, f"tags.`{STUDY_TAG}` = '{self._study}'")
            if parent is None:
                tags = {STUDY_TAG: self._study, "mlflow.note.content": _NOTE}
                parent = client.create_run(experiment_id, tags=tags, run_name=self._study)
            parent_id = str(parent.info.run_id)
            self._ids = (experiment_id, parent_id)
            client.update_run(parent_id, status="RUNNING")
            plain = config.model_dump(mode="json", exclude={"space"})
            params = {"space": config.space.name, **dict(flatten(plain, "study."))}
            self._log_batches(parent_id, [], {} if parent.data.params else params, {}, 0)
            client.log_text(parent_id, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), "study.yaml")
        return parent_id

    def start_trial(self, number: int) -> None:
        """Create the trial's child run in status RUNNING."""
        self._guarded(lambda: self._create_run(number, None))

    def finish_trial(
        self,
        number: int,
        state: str,
        result: TrialResult | None,
        *,
        reason: str | None = None,
        files: Path | None = None,
    ) -> None:
        """Log everything about a finished trial and end its run; doing it twice changes nothing.

        Args:
            number: The trial's number.
            state: A key of `RUN_STATUS`.
            result: What the trial found out; None if it did not get that far.
            reason: Why it failed, stopped or is infeasible.
            files: Folder whose files become the run's artifacts.
        """
        self._guarded(lambda: self.write_trial(number, state, result, reason=reason, files=files))

    def log_study(self, metrics: Sequence[LoggedMetric]) -> None:
        """Log numbers of the study itself to its parent run; doing it twice changes nothing."""

        def log() -> None:
            _, parent_id = self._study_ids()
            self._log_batches(parent_id, metrics, {}, {}, 0)

        self._guarded(log)

    def log_again(self, number: int, confirmation: "Confirmation") -> None:
        """Log what measuring a member of the front again has shown, as `again.NAME`; doing it twice changes nothing."""

        def log() -> None:
            run = self._find_trial_run(number)
            if run is not None:
                found = () if confirmation.result is None else result_metrics(confirmation.result)
                metrics = [LoggedMetric(f"again.{name}", value, step) for name, value, step in found]
                tags = {AGAIN_TAG: confirmation.reason or "holds"}
                self._log_batches(str(run.info.run_id), metrics, {}, tags, int(run.info.start_time))

        self._guarded(log)

    def finish_study(self, status: str, files: Path | None) -> None:
        """End the parent run as "FINISHED", "KILLED" or "FAILED" and log the study's report files."""

        def finish() -> None:
            _, parent_id = self._study_ids()
            if files is not None:
                self._client.log_artifacts(parent_id, str(files))
            self._client.set_terminated(parent_id, status)

        self._guarded(finish)

    def write_trial(
        self,
        number: int,
        state: str,
        result: TrialResult | None,
        *,
        reason: str | None = None,
        files: Path | None = None,
        span: tuple[datetime | None, datetime | None] = (None, None),
        is_repaired: bool = False,
    ) -> None:
        """Do what `finish_trial` does, but let errors out; repair uses it, with the times Optuna remembers.

        Raises:
            StoreError: If the store does not answer.
        """
        with _store_errors(self._store):
            run = self._find_trial_run(number) or self._create_run(number, span[0])
            run_id = str(run.info.run_id)
            tags = {STATE_TAG: state}
            if reason is not None:
                tags[REASON_TAG] = reason
            if is_repaired:
                tags[REPAIRED_TAG] = "true"
            metrics: list[LoggedMetric] = []
            params: dict[str, str] = {}
            if result is not None:
                tags[DIGEST_TAG] = result.config_digest
                metrics, params = result_metrics(result), config_params(result.config)
                if result.stopped_by is not None:
                    tags[STOPPED_TAG] = str(result.stopped_by)
                if result.latency is not None:
                    tags[LATENCY_TAG] = result.latency.kind
                    if (error := result.latency.measurement_error) is not None:
                        tags[MEASUREMENT_TAG] = error
            self._log_batches(run_id, metrics, params, tags, int(run.info.start_time))
            if files is not None:
                self._client.log_artifacts(run_id, str(files))
            status = RUN_STATUS[state]
            if status != "RUNNING":
                self._client.set_terminated(run_id, status, end_time=_milliseconds(span[1]))

    def trial_runs(self) -> tuple[TrialRun, ...]:
        """Return every child run of the study, oldest first.

        Raises:
            StoreError: If the store does not answer.
        """
        with _store_errors(self._store):
            experiment_id, parent_id = self._study_ids()
            runs: list[Run] = []
            token: str | None = None
            while True:
                page = self._client.search_runs(
                    [experiment_id],
                    f"tags.`{PARENT_TAG}` = '{parent_id}'",
                    order_by=["attributes.start_time ASC"],
                    page_token=token,
                )
                runs += page
                token = page.token
                if not token:
                    return tuple(_trial_run(run) for run in runs)

    def delete_run(self, run_id: str) -> None:
        """Take a run out of the record (MLflow keeps it restorable).

        Raises:
            StoreError: If the store does not answer.
        """
        with _store_errors(self._store):
            self._client.delete_run(run_id)

    @property
    def _client(self) -> "MlflowClient":
        if self._open_client is None:
            self._open_client = _connect(self._store)
        return self._open_client

    def _guarded(self, log: Callable[[], object]) -> None:
        """Run one logging action; if the store does not answer, warn the first time and go on."""
        try:
            with _store_errors(self._store):
                log()
        except StoreError as error:
            if not self._has_warned:
                logger.warning("%s The study goes on; its MLflow record is completed when it ends.", error)
            self._has_warned = True

    def _study_ids(self) -> tuple[str, str]:
        """Return the ids of experiment and parent run, which the runner has made."""
        if self._ids is None:
            experiment = self._client.get_experiment_by_name(self._study)
            parent = experiment and self._find_run(experiment.experiment_id, f"tags.`{STUDY_TAG}` = '{self._study}'")
            if experiment is None or parent is None:
                raise StoreError(
                    f"MLflow must know study '{self._study}', but {self._store} has no run of it; "
                    "start it with hyq-search run."
                )
            self._ids = (experiment.experiment_id, str(parent.info.run_id))
        return self._ids

    def _find_run(self, experiment_id: str, condition: str) -> "Run | None":
        found = self._client.search_runs([experiment_id], condition, max_results=1)
        return found[0] if found else None

    def _find_trial_run(self, number: int) -> "Run | None":
        experiment_id, parent_id = self._study_ids()
        return self._find_run(experiment_id, f"tags.`{PARENT_TAG}` = '{parent_id}' AND tags.`{TRIAL_TAG}` = '{number}'")

    def _create_run(self, number: int, started: datetime | None) -> "Run":
        experiment_id, parent_id = self._study_ids()
        tags = {PARENT_TAG: parent_id, TRIAL_TAG: str(number), STATE_TAG: "running"}
        return self._client.create_run(experiment_id, _milliseconds(started), tags, run_name=f"trial {number}")

    def _log_batches(
        self,
        run_id: str,
        metrics: Sequence[LoggedMetric],
        params: Mapping[str, str],
        tags: Mapping[str, str],
        timestamp_ms: int,
    ) -> None:
        """Log in as few calls as the server's limits allow; one fixed time stamp makes a repetition harmless."""
        from mlflow.entities import Metric, Param, RunTag

        numbers = [Metric(m.name, m.value, timestamp_ms, m.step) for m in metrics]
        texts = [Param(key, value) for key, value in params.items()]
        labels = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, max(len(numbers), 1), _MAX_METRICS):
            batch = {"metrics": numbers[start : start + _MAX_METRICS]}
            self._client.log_batch(run_id, **batch, tags=labels if start == 0 else ())
        for start in range(0, len(texts), _MAX_PARAMS):
            self._client.log_batch(run_id, params=texts[start : start + _MAX_PARAMS])


def _trial_run(run: "Run") -> TrialRun:
    tags: dict[str, Any] = run.data.tags
    return TrialRun(
        run_id=str(run.info.run_id),
        number=int(tags.get(TRIAL_TAG, -1)),
        status=str(run.info.status),
        state=tags.get(STATE_TAG),
        digest=tags.get(DIGEST_TAG),
        metrics=dict(run.data.metrics),
    )


def _milliseconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp() * 1000)
