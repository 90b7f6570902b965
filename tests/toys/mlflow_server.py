"""A real MLflow server on loopback: its own database, artifacts through the server."""

import sys
from pathlib import Path

from search.ui import server_environment
from tests.toys.ports import free_port
from tests.toys.servers import Server


def mlflow_server(folder: Path) -> Server:
    """Return a server of a folder, not started; it can be killed and started again on the same port."""
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--serve-artifacts"]
    places = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "files")]
    settings = [f"{name}={value}" for name, value in server_environment().items()]
    command = ["env", *settings, sys.executable, "-m", "mlflow", "server", *options, *places]
    return Server(command, port, f"http://127.0.0.1:{port}")
