"""Where studies are kept: Optuna's database, and what a study's own attributes hold.

The runner alone creates databases. Workers and readers open what exists. SQLite is put into WAL mode once, and every
transaction begins IMMEDIATE: Optuna reads a trial's state before it writes it, and on SQLite only a lock taken before
the read keeps two workers from popping the same waiting trial. Optuna waits for locks `BUSY_TIMEOUT_S` seconds.

    study.user_attrs    study_config, prompts    what the study is; workers read it from here
                        float_scores             metrics of the float videos, by name, once measured
                        noise_floor              how far float itself moves under neutral changes, once measured
                        presets_enqueued         True once the space's presets are in the queue
                        model_fingerprint        which model it is about; earlier_presets: what of others was queued
                        confirmed:NUMBER         a member of the front measured again
"""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage

from search.errors import StoreError
from search.noise_floor import NoiseFloor
from search.prompts import StudyPrompts
from search.result import MetricResult
from search.retry import known_experiments, queue_again
from search.study import StudyConfig
from spaces.space import did_you_mean

BUSY_TIMEOUT_S = 60.0
HEARTBEAT_S = 5
GRACE_S = 60
"""A trial without a heartbeat for so long is lost; a local runner notices a dead worker at once, by its process id."""
MIN_FREE_BYTES = 200 * 2**20


def database_path(store: Path) -> Path:
    """Return the file of the Optuna database in a store."""
    return store / "optuna.db"


def open_study(store: Path, name: str, *, create: bool = False, url: str | None = None) -> optuna.Study:
    """Open a stored study.

    Args:
        store: The study's folder.
        name: The study's name.
        create: Make the database if it does not exist; the study itself is made by `create_study`.
        url: SQLAlchemy URL of the database; None is SQLite in the store.

    Raises:
        StoreError: If the database or the study does not exist, or the database is locked or cannot be used.
    """
    with store_errors(store):
        storage = open_storage(store, create=create, url=url)
        names = _names(storage)
        if name not in names:
            known = ", ".join(names) or "none yet"
            hint = did_you_mean(name, names)
            raise StoreError(f"study {name!r} is not in store {store}; it holds {known}{hint}")
        return optuna.load_study(study_name=name, storage=storage)


def create_study(
    store: Path, config: StudyConfig, prompts: StudyPrompts, *, url: str | None = None
) -> tuple[optuna.Study, bool]:
    """Open a study, or create it with its config and prompts; return it and whether it is new."""
    with store_errors(store):
        storage = open_storage(store, create=True, url=url)
        is_new = config.name not in _names(storage)
        study = optuna.create_study(
            study_name=config.name,
            storage=storage,
            directions=[objective.direction for objective in config.objectives],
            load_if_exists=True,
        )
        if "study_config" not in study.user_attrs:
            with known_experiments():
                study.set_metric_names([objective.metric for objective in config.objectives])
            study.set_user_attr("prompts", prompts.model_dump(mode="json"))
            study.set_user_attr("study_config", config.model_dump(mode="json"))
        return study, is_new


def study_names(store: Path, *, url: str | None = None) -> tuple[str, ...]:
    """Return the names of the studies in a store, sorted; none if there is no database.

    Args:
        store: The studies' folder.
        url: SQLAlchemy URL of the database; None is SQLite in the store.

    Raises:
        StoreError: If a database does not answer.
    """
    if url is None and not database_path(store).is_file():
        return ()
    with store_errors(store):
        return _names(open_storage(store, url=url))


def stored_config(study: optuna.Study) -> StudyConfig:
    """Return the config a study was created with.

    Raises:
        StoreError: If the study was not made by hyq-search.
    """
    return StudyConfig.model_validate(_attribute(study, "study_config"))


def stored_prompts(study: optuna.Study) -> StudyPrompts:
    """Return the prompts a study was created with."""
    return StudyPrompts.model_validate(_attribute(study, "prompts"))


def float_results(study: optuna.Study) -> dict[str, MetricResult]:
    """Return the metrics of the float videos by name; empty until a worker has measured them."""
    return {
        name: MetricResult.model_validate(value) for name, value in study.user_attrs.get("float_scores", {}).items()
    }


def float_scores(study: optuna.Study) -> dict[str, float]:
    """Return the means of the metrics of the float videos by name; empty until a worker has measured them."""
    return {name: result.mean for name, result in float_results(study).items()}


def stored_floor(study: optuna.Study) -> NoiseFloor | None:
    """Return a study's noise floor; None until a worker has measured it."""
    found = study.user_attrs.get("noise_floor")
    return None if found is None else NoiseFloor.model_validate(found)


def open_storage(store: Path, *, create: bool = False, url: str | None = None) -> RDBStorage:
    """Open the Optuna database of a store; with `create`, make it if it does not exist.

    Raises:
        StoreError: If there is none and `create` is off, or it cannot be used.
    """
    path = database_path(store)
    if url is None and create:
        _make_database(path)
    elif url is None and not path.is_file():
        raise StoreError(f"store {store} holds no studies; start one with `hyq-search run`, or give another --store")
    is_sqlite = url is None or url.startswith("sqlite")
    with known_experiments():
        storage = RDBStorage(
            url or f"sqlite:///{path}",
            engine_kwargs={"connect_args": {"timeout": BUSY_TIMEOUT_S}} if is_sqlite else {"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT_S,
            grace_period=GRACE_S,
            heartbeat_stale_trial_callback=queue_again,
        )
    if is_sqlite:
        _begin_immediate(storage.engine)
    return storage


@contextmanager
def store_errors(store: Path) -> Iterator[None]:
    """Turn what a database or file system says about a store into one StoreError."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, sqlite3.Error) as error:
        cause = error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).splitlines()[0]
        raise StoreError(
            f"the databases of store {store} must be usable, but one answered '{reason}'; see that no other program "
            f"holds it and that the folder is writable"
        ) from error
    except OSError as error:
        raise StoreError(f"store {store} must be a writable folder, but: {error}; give another --store") from error


def require_space(store: Path) -> None:
    """Refuse a store on a full disk.

    Raises:
        StoreError: If less than `MIN_FREE_BYTES` are free.
    """
    with store_errors(store):
        store.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(store).free
    if free_bytes < MIN_FREE_BYTES:
        raise StoreError(
            f"a store needs {MIN_FREE_BYTES >> 20} MiB of free space, but {store} has {free_bytes >> 20} MiB; "
            f"free some or give another --store"
        )


def _make_database(path: Path) -> None:
    """Make a database with all its tables, unless there is one; who looks meanwhile finds none, not half of one."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        draft = Path(folder) / path.name
        with closing(sqlite3.connect(draft)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        RDBStorage(f"sqlite:///{draft}").engine.dispose()
        with closing(sqlite3.connect(draft)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with suppress(FileExistsError):  # another runner was faster
            os.link(draft, path)


def _begin_immediate(engine: sqlalchemy.Engine) -> None:
    """Let every transaction take SQLite's write lock when it begins.

    With a write-ahead log, `synchronous=NORMAL` keeps the database whole in a crash; only a power cut may lose the last
    transactions.

    Source: SQLAlchemy's documentation of the pysqlite dialect on transactional modes; sqlite.org/pragma.html.
    """

    def leave_transactions_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=NORMAL")

    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", leave_transactions_to_us)
    sqlalchemy.event.listen(engine, "begin", begin)
    engine.dispose()


def _names(storage: RDBStorage) -> tuple[str, ...]:
    return tuple(sorted(summary.study_name for summary in storage.get_all_studies()))


def _attribute(study: optuna.Study, key: str) -> Any:
    if key not in study.user_attrs:
        raise StoreError(f"study {study.study_name!r} was not made by hyq-search (it has no {key}); give another study")
    return study.user_attrs[key]
