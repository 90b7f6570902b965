"""What is logged of a trial or a study as one flat value: it can wait on disk, and logging it twice is harmless."""

from datetime import datetime
from typing import TYPE_CHECKING

from pydantic import Field

from hyquant.config import FrozenModel
from search.logged import LoggedMetric, config_params, flatten, result_metrics
from search.result import TrialResult

if TYPE_CHECKING:
    from search.confirmation import Confirmation
    from search.study import StudyConfig

STUDY_TAG, STUDY_ID_TAG, TRIAL_TAG, STATE_TAG = "hyq.study", "hyq.study_id", "hyq.trial", "hyq.state"
DIGEST_TAG, REASON_TAG, REPAIRED_TAG = "hyq.config_digest", "hyq.reason", "hyq.repaired"
AGAIN_TAG, STOPPED_TAG = "hyq.measured_again", "hyq.stopped_by"
LATENCY_TAG, MEASUREMENT_TAG = "hyq.latency", "hyq.measurement_error"
FROM_TAG = "hyq.from."
"""What a result rests on (`search.provenance`), one tag each, such as `hyq.from.torch`."""
COMMIT_TAG = "mlflow.source.git.commit"  # the MLflow UI shows it as the source version
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

Span = tuple[datetime | None, datetime | None]


class RunLog(FrozenModel):
    """Numbers and texts for one run; files may go with it.

    Attributes:
        number: The trial; None is the study's own run.
        status: MLflow's status; all but "RUNNING" end the run, None leaves it.
        started_ms: When the run began, in milliseconds since 1970; None is now.
        finished_ms: When it ended.
        is_for_server: Whether it waits for an MLflow server, whose address is not stored; the store's own database must
            not take it then.
    """

    number: int | None
    status: str | None = None
    metrics: tuple[LoggedMetric, ...] = ()
    params: dict[str, str] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)
    started_ms: int | None = None
    finished_ms: int | None = None
    is_for_server: bool = False


def study_log(config: "StudyConfig") -> RunLog:
    """Return what the study's own run says of it while it is running."""
    plain = {name: value for name, value in config.stored_form().items() if name != "space"}
    params = {"space": config.space.name, **dict(flatten(plain, "study."))}
    return RunLog(number=None, status="RUNNING", params=params)


def trial_log(
    number: int,
    state: str,
    result: TrialResult | None,
    *,
    reason: str | None = None,
    span: Span = (None, None),
    is_repaired: bool = False,
) -> RunLog:
    """Return everything about a finished trial.

    Args:
        number: The trial's number.
        state: A key of `RUN_STATUS`.
        result: What the trial found out; None if it did not get that far.
        reason: Why it failed, stopped or is infeasible.
        span: When it began and ended.
        is_repaired: Whether this is made up for afterwards.
    """
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
        if result.provenance is not None:
            tags |= {f"{FROM_TAG}{name}": value for name, value in result.provenance.flat().items()}
            tags[COMMIT_TAG] = result.provenance.code or "unknown"
        if result.stopped_by is not None:
            tags[STOPPED_TAG] = str(result.stopped_by)
        if result.latency is not None:
            tags[LATENCY_TAG] = result.latency.kind
            if (error := result.latency.measurement_error) is not None:
                tags[MEASUREMENT_TAG] = error
    status = RUN_STATUS[state]
    return RunLog(
        number=number,
        status=None if status == "RUNNING" else status,
        metrics=tuple(metrics),
        params=params,
        tags=tags,
        started_ms=milliseconds(span[0]),
        finished_ms=milliseconds(span[1]),
    )


def again_log(number: int, confirmation: "Confirmation") -> RunLog:
    """Return what measuring a member of the front again has shown, as `again.NAME`."""
    found = () if confirmation.result is None else result_metrics(confirmation.result)
    metrics = tuple(LoggedMetric(f"again.{name}", value, step) for name, value, step in found)
    return RunLog(number=number, metrics=metrics, tags={AGAIN_TAG: confirmation.reason or "holds"})


def milliseconds(moment: datetime | None) -> int | None:
    """Return a time as MLflow counts it."""
    return None if moment is None else int(moment.timestamp() * 1000)
