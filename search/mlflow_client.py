"""The connection to MLflow: the store's own SQLite database, or a server's address. The only importer of mlflow.

A store of its own is a folder with `mlflow.db` (SQLite, write-ahead log) and `artifacts/`. `prepare_store` creates the
database and is called by the runner alone, because two processes that create it crash each other. A server keeps a
database and artifacts of its own, and is asked briefly: one that does not answer must not hold a trial for minutes.
"""

import logging
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from search.addresses import require_plain_address
from search.errors import StoreError
from search.logged import LoggedMetric
from search.redaction import redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

    Client: TypeAlias = MlflowClient
    Run: TypeAlias = MlflowRun

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
"""Set where the user has set nothing else: no usage pings, and a server that is dead or accepts and never answers costs
one time-out of 5 s. Nothing is tried twice at once, because the spool tries again later."""

_MAX_METRICS, _MAX_PARAMS = 1000, 100  # per batch: limits of MLflow's REST API, "Log Batch"


_FOR_GOOD = (400, 409, 413, 422)
"""HTTP's codes for what will not be taken next time either; passwords, quotas and missing runs may be mended."""


class Refused(StoreError):
    """MLflow answers, but will never take this."""


def database_path(store: Path) -> Path:
    """Return where a store keeps its MLflow database."""
    return store / "mlflow.db"


def require_undamaged(store: Path) -> None:
    """Refuse what stands for a store's database and is none of SQLite; without one, or an empty one, all is well.

    SQLite itself looks, for a file that is opened and closed beside it loses the locks of this process's connections,
    and whoever ends last then takes the log away from under them. Source: https://sqlite.org/howtocorrupt.html, 2.2.

    Raises:
        StoreError: If it is something else.
    """
    path = database_path(store)
    if not path.is_file():
        return
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError:  # busy, or in a folder of others: whoever uses it will say so
        return
    except sqlite3.DatabaseError as error:
        raise StoreError(
            f"{path} must be MLflow's database, but is damaged or something else; put a copy of it back, or move "
            "it away and let `hyq-search run` make it again"
        ) from error


def tracking_uri(store: Path, uri: str | None = None) -> str:
    """Return the address under which MLflow finds a study's runs; without a server's that of the store."""
    return uri or f"sqlite:///{database_path(store).resolve()}"


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
    with mlflow_errors(store):
        connect(store)  # an empty database is migrated here


def connect(store: Path, uri: str | None = None) -> "Client":
    """Return a client of a server or of a store's existing database; MLflow's pings and chatter are switched off.

    Raises:
        StoreError: If there is no server's address and no database, or the address may be misread.
    """
    if uri is not None:
        require_plain_address(uri)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if uri is None and not database_path(store).is_file():
        raise StoreError(f"a store must hold mlflow.db, but {store} does not; start the study with hyq-search run.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # MLflow's own, about how it uses SQLAlchemy
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors reach us as exceptions
        return MlflowClient(tracking_uri=tracking_uri(store, uri))


@contextmanager
def mlflow_errors(store: Path, uri: str | None = None) -> Iterator[None]:
    """Turn what MLflow, SQLAlchemy, HTTP and the disk raise into one StoreError; `Refused` if it said no for good."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        first_line = redacted(str(error).strip().splitlines()[0])
        status = None
        if isinstance(error, MlflowException):
            status = error.get_http_status_code()
        elif isinstance(error, HTTPError) and error.response is not None:
            status = error.response.status_code
        where = f"store {store}" if uri is None else f"server {redacted(uri)}"
        sentence = f"the MLflow {where} must answer, but gave '{first_line}'"
        if status in _FOR_GOOD:
            raise Refused(f"{sentence}, which it will give again; mend in MLflow what it names.") from error
        if uri is not None:
            raise StoreError(f"{sentence}; start it, or give another --tracking-uri.") from error
        raise StoreError(
            f"{sentence}; run again when it is free "
            f"(after an upgrade of MLflow: mlflow db upgrade {tracking_uri(store)})."
        ) from error


def log_batches(
    client: "Client", run_id: str, metrics: Sequence[LoggedMetric], tags: Mapping[str, str], timestamp_ms: int
) -> None:
    """Log in as few calls as the server's limits allow; one fixed time stamp makes a repetition harmless."""
    from mlflow.entities import Metric, RunTag

    numbers = [Metric(m.name, m.value, timestamp_ms, m.step) for m in metrics]
    labels = [RunTag(key, value) for key, value in tags.items()]
    for start in range(0, max(len(numbers), 1), _MAX_METRICS):
        batch = {"metrics": numbers[start : start + _MAX_METRICS]}
        client.log_batch(run_id, **batch, tags=labels if start == 0 else ())


def log_params(client: "Client", run_id: str, params: Mapping[str, str]) -> None:
    """Log in as few calls as the server's limits allow; a repetition is harmless, a change is refused."""
    from mlflow.entities import Param

    texts = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(texts), _MAX_PARAMS):
        client.log_batch(run_id, params=texts[start : start + _MAX_PARAMS])


def artifact_runs(client: "Client") -> frozenset[str]:
    """Return the ids of all runs of all experiments, deleted ones too, which MLflow can restore."""
    from mlflow.entities import ViewType

    experiments = [
        one.experiment_id for one in _pages(lambda token: client.search_experiments(ViewType.ALL, page_token=token))
    ]
    runs = _pages(lambda token: client.search_runs(experiments, "", ViewType.ALL, page_token=token))
    return frozenset(str(run.info.run_id) for run in runs)


def _pages(page: Callable[[str | None], Any]) -> Iterator[Any]:
    token: str | None = None
    while True:
        found = page(token)
        yield from found
        token = found.token
        if not token:
            return
