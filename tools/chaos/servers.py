"""PostgreSQL and MLflow as processes that can be killed and started again on the same data."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tools.chaos.network import SERVERS, call

START_S = 180
POSTGRES_PORT, MLFLOW_PORT = 5432, 5000
STUDY_URL = f"postgresql://postgres@{SERVERS}:{POSTGRES_PORT}/study"
MLFLOW_DATABASE = f"postgresql+psycopg://postgres@{SERVERS}:{POSTGRES_PORT}/mlflow"
TRACKING_URI = f"http://{SERVERS}:{MLFLOW_PORT}"


@dataclass
class Server:
    """One server; `process` leads a session of its own."""

    name: str
    command: list[str]
    port: int
    log: Path
    user: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Say whether the server runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start, and do not wait."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                user=self.user,
                env={**os.environ, **self.environment},
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait(self) -> None:
        """Wait until the port answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex((SERVERS, self.port)) == 0:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} did not start: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """Kill every process of the server."""
        assert self.process is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()


def start_postgres(folder: Path) -> Server:
    """Make a cluster with two empty databases, study and mlflow, and start it."""
    user = pwd.getpwnam("postgres")
    folder.mkdir()
    os.chown(folder, user.pw_uid, user.pw_gid)
    data = folder / "data"
    initdb = ["initdb", "-D", str(data), "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C", "-N"]
    subprocess.run(initdb, user="postgres", check=True, stdout=subprocess.DEVNULL, cwd="/")
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 10.77.0.0/24 trust\n")
    options = [f"listen_addresses={SERVERS}", f"port={POSTGRES_PORT}", f"unix_socket_directories={folder}"]
    command = ["postgres", "-D", str(data), *(part for option in options for part in ("-c", option))]
    server = Server("postgres", command, POSTGRES_PORT, folder.parent / "kept" / "postgres.log", user="postgres")
    server.start()
    server.wait()
    for database in ("study", "mlflow"):
        _created(database)
    return server


def _created(database: str) -> None:
    deadline = time.monotonic() + START_S
    command = ["createdb", "-h", SERVERS, "-p", str(POSTGRES_PORT), "-U", "postgres", database]
    while subprocess.run(command, stderr=subprocess.DEVNULL).returncode:  # it listens before it answers
        if time.monotonic() > deadline:
            raise RuntimeError(f"database {database} could not be created")
        time.sleep(0.5)


def start_mlflow(folder: Path) -> Server:
    """Start an MLflow server with a database of its own that serves artifacts from a folder."""
    folder.mkdir()
    where = ["--host", SERVERS, "--port", str(MLFLOW_PORT), "--workers", "1", "--allowed-hosts", "*"]
    stores = ["--backend-store-uri", MLFLOW_DATABASE, "--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", *where, *stores]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    server = Server("mlflow", command, MLFLOW_PORT, folder.parent / "kept" / "mlflow.log", environment=quiet)
    server.start()
    server.wait()
    return server


def mount_disk(folder: Path, mebibytes: int) -> None:
    """Mount a small disk of its own at a folder."""
    folder.mkdir(parents=True)
    call("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "hyq", str(folder))


def fill(folder: Path) -> int:
    """Fill a disk to the last byte and return how many there were."""
    free = shutil.disk_usage(folder).free
    block = b"\0" * 2**20
    try:
        with (folder / "filler").open("wb", buffering=0) as file:
            while file.write(block):
                pass
    except OSError:  # no space left on device
        pass
    return free


def drain(folder: Path) -> None:
    """Give the space back."""
    (folder / "filler").unlink(missing_ok=True)
