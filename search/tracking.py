"""The MLflow record of a study: one parent run for the study, one child run per trial, in the store or on a server.

MLflow is a record, not the truth (Optuna is). What is to be logged is written into the store's spool first and sent
from there (`search.spool`): MLflow that does not answer is warned about once and asked again every half minute, and
never fails or holds up a trial. `search.repair` makes up for what is missing in the end.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from search.errors import StoreError
from search.logged import LoggedMetric, flatten
from search.mlflow_client import Refused, connect, database_path, log_batches, mlflow_errors
from search.result import TrialResult
from search.run_log import (
    DIGEST_TAG,
    PARENT_TAG,
    STATE_TAG,
    STUDY_TAG,
    TRIAL_TAG,
    RunLog,
    Span,
    again_log,
    trial_log,
)
from search.spool import Spool

if TYPE_CHECKING:
    from search.confirmation import Confirmation
    from search.mlflow_client import Client, Run
    from search.study import StudyConfig

logger = logging.getLogger(__name__)

RETRY_S = 30.0
"""After a failure nothing is sent for so long; then one log is tried."""

CREATOR_S = 10.0
"""Whoever made the experiment makes the study's run; others wait for it so long before they make one."""

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI's page for runs, not for chat models
_RUN_TAG = "hyq.run"  # of the experiment: the study's own run
_NOTE = (
    "A study of hyq-search. Under Artifacts: the front as `front.html` and `front.png`, what decides about each "
    "objective as `importances.png`, all trials as `trials.md`. Each nested run is a trial: its `videos.mp4` and "
    "`strip.png` show float and quantized side by side."
)


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
    """Logs one study; made in the runner and in every worker's rank 0.

    Args:
        store: Folder of the store, with the spool; `prepare_store` was called on it if there is no `uri`.
        study: The study's name, which is also the name of the MLflow experiment.
        uri: Address of an MLflow server; None is the store's own database.
        clock: Seconds that never go back.
    """

    def __init__(
        self, store: Path, study: str, uri: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._study = study
        self._uri = uri
        self._clock = clock
        self._spool = Spool(store, study)
        self._open_client: Client | None = None
        self._ids: tuple[str, str] | None = None
        self._silent_until = 0.0
        self._has_warned = False

    def open_study(self, config: "StudyConfig") -> str:
        """Find or create the study's experiment and parent run, mark it running, and return the parent's run id.

        Of several hosts that do this at once one creates, because a server has one experiment of a name.

        Raises:
            StoreError: If MLflow does not answer.
        """
        with mlflow_errors(self._store, self._uri):
            experiment_id, is_mine = self._experiment()
            parent_id = self._parent(experiment_id) if is_mine else self._awaited_parent(experiment_id)
            if parent_id is None:
                tags = {STUDY_TAG: self._study, "mlflow.note.content": _NOTE}
                parent_id = str(self._client.create_run(experiment_id, tags=tags, run_name=self._study).info.run_id)
            self._client.set_experiment_tag(experiment_id, _RUN_TAG, parent_id)
            self._ids = (experiment_id, parent_id)
            self._client.update_run(parent_id, status="RUNNING")
            plain = config.model_dump(mode="json", exclude={"space"})
            params = {"space": config.space.name, **dict(flatten(plain, "study."))}
            is_known = bool(self._client.get_run(parent_id).data.params)
            log_batches(self._client, parent_id, [], {} if is_known else params, {}, 0)
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            self._client.log_text(parent_id, text, "study.yaml")
        return parent_id

    def start_trial(self, number: int) -> None:
        """Create the trial's child run in status RUNNING, if MLflow answers; `finish_trial` does it otherwise."""
        self._attempt(lambda: self._create_run(number, None))

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
        """Send what waits in the spool, oldest first, unless MLflow is known to be away; return how many remain."""
        with self._spool.sending() as is_ours:
            if is_ours:
                for spooled in self._spool.waiting():
                    if self._attempt(lambda spooled=spooled: self.send(spooled.log, spooled.files)):  # type: ignore[misc]
                        self._spool.remove(spooled)
                    elif self._is_silent:
                        break
        return sum(1 for _ in self._spool.waiting())

    def send(self, log: RunLog, files: Path | None = None) -> None:
        """Log to MLflow now; doing it twice changes nothing.

        Raises:
            StoreError: If MLflow does not answer or does not take it.
        """
        with mlflow_errors(self._store, self._uri):
            if log.number is None:
                run_id, timestamp_ms = self._study_ids()[1], 0
            else:
                run = self._find_trial_run(log.number) or self._create_run(log.number, log.started_ms)
                run_id, timestamp_ms = str(run.info.run_id), int(run.info.start_time)
            log_batches(self._client, run_id, log.metrics, log.params, log.tags, timestamp_ms)
            if files is not None:
                self._client.log_artifacts(run_id, str(files))
            if log.status is not None:
                self._client.set_terminated(run_id, log.status, end_time=log.finished_ms)

    def trial_runs(self) -> tuple[TrialRun, ...]:
        """Return every child run of the study, oldest first.

        Raises:
            StoreError: If MLflow does not answer.
        """
        with mlflow_errors(self._store, self._uri):
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

    def _log(self, label: str, log: RunLog, files: Path | None = None) -> None:
        """Write a log to the spool and send what lies there; nothing is kept for a store without MLflow."""
        if self._uri is None and not database_path(self._store).is_file():
            self._attempt(lambda: self._client)
            return
        try:
            self._spool.add(label, log, files)
        except OSError as error:
            self._warn(f"the spool must take what MLflow is to get, but {self._spool.folder} gave '{error}'.")
            return
        self.deliver()

    def _attempt(self, action: Callable[[], object]) -> bool:
        """Do something with MLflow and say whether it worked; after it did not answer, do nothing for a while."""
        if self._is_silent:
            return False
        try:
            with mlflow_errors(self._store, self._uri):
                action()
        except StoreError as error:
            self._warn(str(error))
            if not isinstance(error, Refused):
                self._silent_until = self._clock() + RETRY_S
            return False
        return True

    def _warn(self, sentence: str) -> None:
        if not self._has_warned:
            logger.warning("%s The study goes on; its MLflow record is completed later.", sentence)
        self._has_warned = True

    def _experiment(self) -> tuple[str, bool]:
        """Return the experiment's id and whether its run is ours to make: it is there already or just made by us."""
        from_before = self._client.get_experiment_by_name(self._study)
        if from_before is not None:
            return str(from_before.experiment_id), False
        location = (self._store / "artifacts").resolve().as_uri() if self._uri is None else None
        try:
            with mlflow_errors(self._store, self._uri):
                made = self._client.create_experiment(self._study, artifact_location=location, tags=_EXPERIMENT_TAGS)
            return str(made), True
        except StoreError:  # perhaps because another host was faster
            experiment = self._client.get_experiment_by_name(self._study)
            if experiment is None:
                raise
            return str(experiment.experiment_id), False

    def _parent(self, experiment_id: str) -> str | None:
        tags = self._client.get_experiment(experiment_id).tags
        if _RUN_TAG in tags:
            return str(tags[_RUN_TAG])
        run = self._find_run(experiment_id, f"tags.`{STUDY_TAG}` = '{self._study}'")
        return None if run is None else str(run.info.run_id)

    def _awaited_parent(self, experiment_id: str) -> str | None:
        deadline = time.monotonic() + CREATOR_S
        while (found := self._parent(experiment_id)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _study_ids(self) -> tuple[str, str]:
        """Return the ids of experiment and parent run, which `open_study` has made."""
        if self._ids is None:
            experiment = self._client.get_experiment_by_name(self._study)
            parent_id = experiment and self._parent(experiment.experiment_id)
            if experiment is None or parent_id is None:
                raise StoreError(
                    f"MLflow must know study '{self._study}', but {self._store} has no run of it; "
                    "start it with hyq-search run."
                )
            self._ids = (str(experiment.experiment_id), parent_id)
        return self._ids

    def _find_run(self, experiment_id: str, condition: str) -> "Run | None":
        found = self._client.search_runs([experiment_id], condition, max_results=1)
        return found[0] if found else None

    def _find_trial_run(self, number: int) -> "Run | None":
        experiment_id, parent_id = self._study_ids()
        return self._find_run(experiment_id, f"tags.`{PARENT_TAG}` = '{parent_id}' AND tags.`{TRIAL_TAG}` = '{number}'")

    def _create_run(self, number: int, started_ms: int | None) -> "Run":
        experiment_id, parent_id = self._study_ids()
        tags = {PARENT_TAG: parent_id, TRIAL_TAG: str(number), STATE_TAG: "running"}
        return self._client.create_run(experiment_id, started_ms, tags, run_name=f"trial {number}")


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
