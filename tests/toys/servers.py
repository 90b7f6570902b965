"""Real database servers on loopback, each in a folder of its own that is gone afterwards."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from tests.toys.ports import free_port

START_S = 120
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@dataclass
class Server:
    """A server that can be stopped, killed and started again on the same data and port."""

    command: list[str]
    port: int
    url: str
    user: str | None = None
    process: subprocess.Popen | None = field(default=None)

    def start(self) -> None:
        """Start, and wait until the port answers."""
        self.process = subprocess.Popen(self.command, user=self.user, start_new_session=True, **QUIET)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"{self.command[0]} did not start")

    def kill(self) -> None:
        """Kill the server and every process of its own, as a power cut would."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Stop the server in order: it breaks connections and writes what it has."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT if "postgres" in self.command[0] else signal.SIGTERM)
        self.process.wait(60)


class Cable:
    """A TCP connection to a server on this host that can be cut: nothing passes, and nobody is told.

    Attributes:
        port: Where clients connect to.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._is_whole = threading.Event()
        self._is_whole.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Let nothing pass any more."""
        self._is_whole.clear()

    def mend(self) -> None:
        """Let everything pass again, what waited too."""
        self._is_whole.set()

    def close(self) -> None:
        """Take no further connection."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with source, sink, suppress(OSError):
            while piece := source.recv(65536):
                self._is_whole.wait()
                sink.sendall(piece)


@contextmanager
def postgres(password: str | None = None) -> Iterator[Server]:
    """A PostgreSQL server with an empty database named postgres, whose user postgres needs the password, or none."""
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="hyq-postgres-"))
    try:
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        data, port = folder / "data", free_port()
        secret = folder / "password"
        secret.write_text(password or "secret")
        secret.chmod(0o644)
        initdb = ["initdb", "-D", str(data), "-U", "postgres", "-E", "UTF8", "--locale=C", "-N"]
        initdb += [f"--pwfile={secret}", "--auth=trust" if password is None else "--auth=scram-sha-256"]
        subprocess.run(initdb, user=user, check=True, **QUIET)
        options = [f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={folder}"]
        command = ["postgres", "-D", str(data), *(part for option in options for part in ("-c", option))]
        server = Server(
            command, port, f"postgresql://postgres:{quote(secret.read_text(), safe='')}@127.0.0.1:{port}/postgres", user
        )
        yield from _running(server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def mariadb() -> Iterator[Server]:
    """A MariaDB server with an empty database named study, whose user root needs no password."""
    folder = Path(tempfile.mkdtemp(prefix="hyq-mariadb-"))
    try:
        data, port = folder / "data", free_port()
        me = pwd.getpwuid(os.getuid()).pw_name
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={me}"]
        subprocess.run([*install, "--auth-root-authentication-method=normal"], check=True, **QUIET)
        (data / "study").mkdir(exist_ok=True)
        options = [f"--port={port}", "--bind-address=127.0.0.1", f"--socket={folder}/socket", f"--user={me}"]
        binary = shutil.which("mariadbd") or "/usr/sbin/mariadbd"
        command = [binary, "--no-defaults", f"--datadir={data}", *options]
        yield from _running(Server(command, port, f"mysql://root@127.0.0.1:{port}/study"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()
