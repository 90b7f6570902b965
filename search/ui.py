"""How the MLflow server of a store is started: by default on loopback, without usage pings or extra processes."""

import socket
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from search.errors import SearchError, StoreError
from search.mlflow_client import database_path, require_undamaged, tracking_uri

HOST = "127.0.0.1"
LOOPBACK = (HOST, "localhost")


def server_command(store: Path, port: int, host: str = HOST) -> list[str]:
    """Return the command that serves a store's runs, to this machine only unless another address is given.

    Raises:
        StoreError: If the store has no MLflow database, or it is damaged or may not be written.
        SearchError: If the port is taken.
    """
    if not database_path(store).is_file():
        raise StoreError(f"a store must hold mlflow.db, but {store} does not; start a study with hyq-search run.")
    require_undamaged(store)
    _require_openable(database_path(store))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SearchError(
                f"port {port} must be free on {host}, but {(error.strerror or 'it is not').lower()}; "
                "give another --port or --host."
            ) from error
    uri = tracking_uri(store)
    options = ["--host", host, "--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    return [sys.executable, "-m", "mlflow", "server", *options]


def _require_openable(path: Path) -> None:
    """Let SQLite look into a database, whose folder it must be able to write to even for that."""
    try:
        with closing(sqlite3.connect(path, timeout=5.0)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise StoreError(
            f"{path} must be a whole database in a writable folder, but SQLite says '{error}'; ask for rights to its "
            "folder, or copy all of that to one of yours"
        ) from error


def server_environment() -> dict[str, str]:
    """Return what to set for the server: no usage pings, no job runner, no news from the internet."""
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
