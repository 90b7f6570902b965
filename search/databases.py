"""From the address of a database to Optuna's storage.

    None                             optuna.db in the store, SQLite
    sqlite:///FILE                   another SQLite file
    postgresql://USER:PASSWORD@HOST/NAME         PostgreSQL, by psycopg
    mysql://..., mariadb://...       MySQL or MariaDB, by PyMySQL
    grpc://HOST:PORT                 a proxy of any of these, started by `hyq-search storage-proxy`

The runner alone creates tables; everyone else opens what exists. Every storage is patient (`search.patience`), but that
behind a proxy, whose clients are. Network connections have time-outs, because a cut network answers nothing at all.
SQLite is put into WAL mode once, and every transaction begins IMMEDIATE: Optuna reads a trial's state before it writes
it, and on SQLite only a lock taken before the read keeps two workers from popping the same waiting trial; servers lock
the row instead. SQLite waits for locks `BUSY_TIMEOUT_S` seconds.
"""

import os
import sqlite3
import tempfile
import weakref
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage

from search.addresses import require_plain_address
from search.errors import EmptyStore, InstallError, StoreError
from search.patience import PATIENCE_S, Patience, PatientStorage, first_line, is_away
from search.redaction import redacted
from search.tables import Tables

BUSY_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 15
PROXY_TIMEOUT_S = 45
"""Even a proxy whose database hangs and is connected to again answers before a lease is lost (60 s, `search.lease`)."""

DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "mysql": "mysql+pymysql"}
DRIVERS["mariadb"] = DRIVERS["mysql"]
"""What an address without a driver stands for."""

_SERVER_ARGUMENTS: dict[str, dict[str, Any]] = {
    # libpq's parameters; tcp_user_timeout is in milliseconds.
    "postgresql+psycopg": {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "keepalives_idle": 5,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": ANSWER_TIMEOUT_S * 1000,
    },
    "mysql+pymysql": {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": ANSWER_TIMEOUT_S,
        "write_timeout": ANSWER_TIMEOUT_S,
    },
}

_NO_TABLES = ("no such table", "unable to open")
"""What SQLite says where there are no studies yet."""

_NO_RIGHT = ("unable to open", "readonly database")
"""What SQLite says of a database that is there in a folder that may not be written: to others, on read-only mounts."""

_WIDE_COLUMNS = ("study_user_attributes", "trial_user_attributes")
"""Tables whose values may be longer than the 64 KiB of MySQL's TEXT: a space with a ladder, the result of a trial."""


def database_path(store: Path) -> Path:
    """Return the file of the Optuna database in a store."""
    return store / "optuna.db"


def open_storage(
    store: Path, *, create: bool = False, url: str | None = None, is_known: bool = False
) -> PatientStorage:
    """Open the database of a study; with `create`, make its tables if there are none.

    Args:
        store: The study's folder.
        create: Whether this process is the one that creates databases.
        url: Address of the database; None is SQLite in the store.
        is_known: Whether the database answered whoever started this process, so that it is waited for.

    Raises:
        StoreError: If there is none and `create` is off, or it cannot be used.
        InstallError: If the address needs a package that is missing.
    """
    patience = Patience(is_known=is_known)
    if url is not None and url.startswith("grpc://"):
        return PatientStorage(_open_proxy(url, PATIENCE_S if is_known else CONNECT_TIMEOUT_S), patience)
    return PatientStorage(open_database(store, create=create, url=url, patience=patience), patience)


def open_database(store: Path, *, create: bool, url: str | None, patience: Patience) -> BaseStorage:
    """Open a database itself, no proxy, with patience until it is open and with none after that.

    Raises:
        StoreError: As `open_storage`.
        InstallError: As `open_storage`.
    """
    path = database_path(store)
    if url is None and create:
        _make_database(path)
    elif url is None and not path.is_file():
        raise EmptyStore(f"store {store} holds no studies; start one with `hyq-search run`, or give another --store")
    tables = patience.call(lambda: _open_tables(with_driver(url or f"sqlite:///{path}"), create=create))
    storage = optuna.storages.get_storage(tables)
    weakref.finalize(storage, tables.engine.dispose)  # whoever opened a study need not close it
    return storage


def with_driver(url: str) -> str:
    """Return an address with the driver that we install: postgresql:// becomes postgresql+psycopg://.

    Raises:
        StoreError: If the address may be misread.
    """
    require_plain_address(url)
    scheme, separator, rest = url.partition("://")
    return f"{DRIVERS.get(scheme, scheme)}{separator}{rest}"


def _open_tables(url: str, *, create: bool) -> Tables:
    is_sqlite = url.startswith("sqlite")
    if (kind := url.partition(":")[0].partition("+")[0]) not in (*DRIVERS, "sqlite"):
        raise StoreError(
            f"a storage must be postgresql://, mysql://, mariadb://, grpc:// or sqlite:///, but got {redacted(url)} "
            f"({kind!r} is none of them); correct it"
        )
    if is_sqlite and create:
        _require_no_others(url)
    connect = {"timeout": BUSY_TIMEOUT_S} if is_sqlite else _SERVER_ARGUMENTS.get(url.partition("://")[0], {})
    try:
        storage = Tables(
            url.replace("{", "{{").replace("}", "}}"),  # Optuna fills templates in addresses
            engine_kwargs={"connect_args": connect, **({} if is_sqlite else {"pool_pre_ping": True})},
            skip_table_creation=not create,
        )
    except ImportError as error:
        raise InstallError(
            f"storage {redacted(url)} needs a driver that is not installed; pip install 'hyq-search[servers]'"
        ) from error
    except (sqlalchemy.exc.ProgrammingError, StorageInternalError) as error:
        if is_away(error):
            raise
        if is_sqlite and _is_there(url) and any(word in first_line(error) for word in _NO_RIGHT):
            raise StoreError(
                f"storage {redacted(url)} must be writable to be read, because SQLite keeps two files beside it, but "
                f"SQLite says '{first_line(error)}'; ask for rights to its folder, or copy all of that to one of yours"
            ) from error
        if is_sqlite and not any(word in first_line(error) for word in _NO_TABLES):
            raise StoreError(
                f"storage {redacted(url)} must be a whole database, but SQLite says '{first_line(error)}'; put a "
                "copy of it back, or move it away and start anew"
            ) from error
        raise EmptyStore(f"storage {redacted(url)} holds no studies; start one with `hyq-search run`") from error
    except sqlalchemy.exc.ArgumentError as error:
        raise StoreError(
            f"a storage must be an address such as postgresql://USER@HOST/NAME, but got {redacted(url)}; correct it"
        ) from error
    except RuntimeError as error:
        raise StoreError(
            f"storage {redacted(url)} must have the tables of Optuna {optuna.__version__}, but has others; "
            f"install the Optuna that made them, or upgrade them with `optuna storage upgrade`"
        ) from error
    if is_sqlite:
        _begin_immediate(storage.engine)
    elif create and storage.engine.name in ("mysql", "mariadb"):
        _widen(storage.engine)
    storage.engine.dispose()  # opening took two connections at once, of which the pool would keep the second for good
    return storage


def _require_no_others(url: str) -> None:
    """Refuse a SQLite file that another program keeps its tables in; what is no database is refused when it is opened.

    Raises:
        StoreError: If it has tables, and none is Optuna's.
    """
    if not _is_there(url):
        return
    try:
        with closing(sqlite3.connect(str(sqlalchemy.make_url(url).database), timeout=BUSY_TIMEOUT_S)) as connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    except sqlite3.Error:
        return
    if tables and "studies" not in tables:
        raise StoreError(
            f"storage {redacted(url)} must be a database of Optuna's or a new file, but it holds another program's "
            f"tables ({', '.join(tables[:3])}{', ...' if tables[3:] else ''}); give another file"
        )


def _is_there(url: str) -> bool:
    path = sqlalchemy.make_url(url).database
    return bool(path) and Path(str(path)).is_file()


def _widen(engine: sqlalchemy.Engine) -> None:
    """Let values be longer than 64 KiB on MySQL; PostgreSQL and SQLite have no such limit.

    Source: MySQL 8 reference manual, 13.7, storage requirements of string types.
    """
    inspector = sqlalchemy.inspect(engine)
    for table in _WIDE_COLUMNS:
        (column,) = (found for found in inspector.get_columns(table) if found["name"] == "value_json")
        if str(column["type"]).upper().startswith("LONGTEXT"):
            continue
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {table} MODIFY value_json LONGTEXT")


def _open_proxy(url: str, wait_s: float) -> BaseStorage:
    try:
        from search.proxy import ProxyStorage
    except ImportError as error:
        raise InstallError(
            f"storage {redacted(url)} needs grpcio and protobuf; pip install 'hyq-search[servers]'"
        ) from error
    require_plain_address(url)
    address = urlsplit(url)
    if address.hostname is None or address.port is None:
        raise StoreError(f"a storage proxy's address must be grpc://HOST:PORT, but got {redacted(url)}; correct it")
    proxy = ProxyStorage(address.hostname, address.port, timeout_s=PROXY_TIMEOUT_S)
    try:
        proxy.wait_server_ready(wait_s)
    except ConnectionError as error:
        raise StoreError(
            f"a storage proxy must answer within {wait_s:.0f} s, but {redacted(url)} does not; "
            f"start it with `hyq-search storage-proxy`"
        ) from error
    return proxy


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
