"""`hyq-search ui` for real: which addresses of this machine it listens at."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from search.mlflow_client import prepare_store
from tests.toys.ports import free_port

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]

LISTENS = "0A"
LOOPBACK = socket.inet_aton("127.0.0.1")[::-1].hex().upper()
START_S = 120


def listening_addresses(port):
    """Return the local addresses of sockets that listen at a port, as the kernel writes them.

    Source: proc_net(5), /proc/net/tcp: the second field is ADDRESS:PORT, the fourth the state, all in hex.
    """
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    places = [row[1].split(":") for row in rows if row[3] == LISTENS]
    return {address for address, place in places if int(place, 16) == port}


def test_the_pages_are_served_to_this_machine_only(tmp_path):
    prepare_store(tmp_path)
    port = free_port()
    command = [sys.executable, "-c", "from search.cli import main; main()", "ui", "demo", "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--store", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + START_S
        while not (found := listening_addresses(port)) and time.monotonic() < deadline and server.poll() is None:
            time.sleep(0.2)
    finally:
        os.killpg(server.pid, 9)
        server.wait()

    assert found == {LOOPBACK}


def test_a_socket_that_is_open_to_others_is_seen():
    with socket.create_server(("0.0.0.0", 0)) as open_socket:
        assert listening_addresses(open_socket.getsockname()[1]) == {"00000000"}
