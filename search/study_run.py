"""A study in MLflow: one experiment of its name with one run of its own, below which the runs of its trials are.

Of several hosts that make them at once one succeeds, because a server has one experiment of a name. Studies of one name
(of two users of a server; of a database that was lost or left behind) are told apart by the id that a study is created
with and that its run carries. Studies made before there were ids have none, and neither have their runs.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from search.errors import StoreError
from search.mlflow_client import log_params, mlflow_errors
from search.redaction import redacted
from search.run_log import DIGEST_TAG, PARENT_TAG, STATE_TAG, STUDY_ID_TAG, STUDY_TAG, TRIAL_TAG

if TYPE_CHECKING:
    from search.mlflow_client import Client, Run

CREATOR_S = 10.0
"""Whoever made the experiment makes the study's run; others wait for it so long before they make one."""

_PAGE = 50
"""Runs that a server is asked for at once: with all their metrics, params and tags, within the time-out of 5 s."""

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI's page for runs, not for chat models
_RUN_TAG = "hyq.run"  # of the experiment: the study's own run
_NOTE = (
    "A study of hyq-search. Under Artifacts: the front as `front.html` and `front.png`, what decides about each "
    "objective as `importances.png`, all trials as `trials.md`. Each nested run is a trial: its `videos.mp4` and "
    "`strip.png` show float and quantized side by side."
)


class OtherStudy(StoreError):
    """MLflow has another study of this name."""


class StudyIds(NamedTuple):
    """Where MLflow has a study."""

    experiment_id: str
    run_id: str


@dataclass(frozen=True)
class TrialRun:
    """What MLflow holds of one trial: its child run, without artifacts."""

    run_id: str
    number: int
    status: str
    state: str | None
    digest: str | None
    metrics: dict[str, float]


def find_study_run(client: "Client", study: str, study_id: str | None) -> StudyIds | None:
    """Return a study's experiment and run; None if MLflow does not know it. Other errors are MLflow's own.

    Raises:
        OtherStudy: If the run of this name has another id.
    """
    experiment = client.get_experiment_by_name(study)
    run_id = None if experiment is None else _own_run(client, experiment.experiment_id, study, study_id)
    return None if experiment is None or run_id is None else StudyIds(str(experiment.experiment_id), run_id)


def find_or_make_study_run(
    client: "Client", study: str, study_id: str | None, store: Path, uri: str | None
) -> StudyIds:
    """Return a study's experiment and run, made if they are not there. Other errors are MLflow's own.

    Raises:
        OtherStudy: If the run of this name has another id.
    """
    experiment_id, is_mine = _experiment(client, study, store, uri)
    find = _own_run if is_mine else _awaited_run
    run_id = find(client, experiment_id, study, study_id)
    if run_id is None:
        tags = {STUDY_TAG: study, "mlflow.note.content": _NOTE}
        if study_id is not None:
            tags[STUDY_ID_TAG] = study_id
        run_id = str(client.create_run(experiment_id, tags=tags, run_name=study).info.run_id)
        client.set_experiment_tag(experiment_id, _RUN_TAG, run_id)  # by its maker alone: MLflow refuses two at once
    return StudyIds(experiment_id, run_id)


def known_study_run(client: "Client", study: str, study_id: str | None, store: Path, uri: str | None) -> StudyIds:
    """Return a study's experiment and run. Other errors are MLflow's own.

    Raises:
        StoreError: If MLflow does not know the study, or has another one of its name.
    """
    found = find_study_run(client, study, study_id)
    if found is not None:
        return found
    where = str(store) if uri is None else redacted(uri)
    or_else = "give --tracking-uri if its record is on a server, or " if uri is None else ""
    raise StoreError(
        f"MLflow must know study '{study}', but {where} has no run of it; {or_else}start it with hyq-search run."
    )


def log_first_params(client: "Client", run_id: str, params: Mapping[str, str], store: Path, uri: str | None) -> None:
    """Log the params of a study's first start, which MLflow refuses to change; of several hosts one does.

    Raises:
        StoreError: If nobody could log them.
    """
    if not params or _has_params(client, run_id):
        return
    try:
        with mlflow_errors(store, uri):
            log_params(client, run_id, params)
    except StoreError:
        if not _has_params(client, run_id):
            raise


def _has_params(client: "Client", run_id: str) -> bool:
    return bool(client.get_run(run_id).data.params)


def trial_runs(client: "Client", ids: StudyIds) -> Iterator[TrialRun]:
    """Yield every trial's run of a study once, oldest first. Errors are MLflow's own."""
    return _found_runs(client, ids, _is_child_of(ids))


def trial_runs_among(client: "Client", ids: StudyIds, run_ids: Collection[str]) -> Iterator[TrialRun]:
    """Yield those trials' runs of a study that are asked for by ids, in order of these. Errors are MLflow's own."""
    asked = sorted(filter(str.isalnum, run_ids))  # as MLflow's ids are: a folder of another name asks for nothing
    for start in range(0, len(asked), _PAGE):
        listed = ", ".join(f"'{run_id}'" for run_id in asked[start : start + _PAGE])
        yield from _found_runs(client, ids, f"{_is_child_of(ids)} AND attributes.run_id IN ({listed})")


def _is_child_of(ids: StudyIds) -> str:
    return f"tags.`{PARENT_TAG}` = '{ids.run_id}'"


def _found_runs(client: "Client", ids: StudyIds, condition: str) -> Iterator[TrialRun]:
    token: str | None = None
    seen: set[str] = set()  # pages are counted off: a run that is made meanwhile shifts others to the next page
    while True:
        page = client.search_runs(
            [ids.experiment_id], condition, max_results=_PAGE, order_by=["attributes.start_time ASC"], page_token=token
        )
        new = [run for run in map(_trial_run, page) if run is not None and run.run_id not in seen]
        seen |= {run.run_id for run in new}
        yield from new
        token = page.token
        if not token:
            return


def first_run(client: "Client", experiment_id: str, condition: str) -> "Run | None":
    """Return a run that fulfils a condition, written as MLflow filters runs."""
    found = client.search_runs([experiment_id], condition, max_results=1)
    return found[0] if found else None


def _experiment(client: "Client", study: str, store: Path, uri: str | None) -> tuple[str, bool]:
    """Return the experiment's id and whether its run is ours to make: it was just made by us."""
    from_before = client.get_experiment_by_name(study)
    if from_before is not None:
        return str(from_before.experiment_id), False
    location = (store / "artifacts").resolve().as_uri() if uri is None else None
    try:
        with mlflow_errors(store, uri):
            made = client.create_experiment(study, artifact_location=location, tags=_EXPERIMENT_TAGS)
        return str(made), True
    except StoreError:  # perhaps because another host was faster
        experiment = client.get_experiment_by_name(study)
        if experiment is None:
            raise
        return str(experiment.experiment_id), False


def _own_run(client: "Client", experiment_id: str, study: str, study_id: str | None) -> str | None:
    tags = client.get_experiment(experiment_id).tags
    if _RUN_TAG in tags:
        run: Run | None = client.get_run(tags[_RUN_TAG])
    else:
        run = first_run(client, experiment_id, f"tags.`{STUDY_TAG}` = '{study}'")
    if run is None:
        return None
    found, run_id = run.data.tags.get(STUDY_ID_TAG), str(run.info.run_id)
    if found != study_id:
        raise OtherStudy(
            f"MLflow's experiment '{study}' must be of this study ({STUDY_ID_TAG} {study_id or 'not set'}), but its "
            f"run {run_id} is of another study of this name ({STUDY_ID_TAG} {found or 'not set'}); rename the "
            "experiment in MLflow, or give the study another name."
        )
    return run_id


def _awaited_run(client: "Client", experiment_id: str, study: str, study_id: str | None) -> str | None:
    deadline = time.monotonic() + CREATOR_S
    while (found := _own_run(client, experiment_id, study, study_id)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _trial_run(run: "Run") -> TrialRun | None:
    """Read the run of a trial; None if it is some other run that was put below the study's."""
    tags: dict[str, Any] = run.data.tags
    number = tags.get(TRIAL_TAG, "")
    if not number.isdecimal():
        return None
    return TrialRun(
        run_id=str(run.info.run_id),
        number=int(number),
        status=str(run.info.status),
        state=tags.get(STATE_TAG),
        digest=tags.get(DIGEST_TAG),
        metrics=dict(run.data.metrics),
    )
