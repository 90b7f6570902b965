"""What the processes of a real slot listen to, by the kernel's own tables, and what becomes of what is sent there."""

import base64
import ipaddress
import os
import pickle
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from search.order import WorkOrder
from search.prompts import StudyPrompts
from search.slots import start_slots, stop_slots
from search.storage import create_study
from search.study import Slot

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc"),
]
LISTENS = "0A"  # include/net/tcp_states.h


class Bomb:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def listening(process):
    """Return the addresses and TCP ports at which a process listens."""
    sockets = set()
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(descriptor))
        except FileNotFoundError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in sockets:
                address, port = fields[1].split(":")
                words = [int(address[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(address), 8)]
                found.append((ipaddress.ip_address(b"".join(words)), int(port, 16)))
    return found


def wait_for(condition, *, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def test_a_slot_listens_on_loopback_alone_unpickles_nothing_and_leaves_no_folder(tmp_path, study_config, monkeypatch):
    """Before and after torchrun has started the ranks anew."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    exploded = tmp_path / "exploded"
    create_study(tmp_path, study_config, StudyPrompts(calibration=("a", "b"), search=("c", "d")))
    order = WorkOrder(
        store=tmp_path, url=None, study=study_config.name, slot=0, first_trial=0, deadline=None, until_trial=None
    )
    slots = start_slots([Slot(ranks=2)], order, device="cpu")
    try:
        agent, log = psutil.Process(slots[0].agent.pid), slots[0].folder / "log.txt"
        for num_starts in (1, 2):
            wait_for(lambda: log.read_text().count("group rank=") == 2 * num_starts, what=log.read_text)  # noqa: B023
            ranks = agent.children()
            found = [listening(process) for process in (agent, *ranks)]

            assert len(ranks) == 2
            assert all(found)
            assert [place for places in found for place in places if not place[0].is_loopback] == []

            bomb = base64.b64encode(pickle.dumps(Bomb(exploded))).decode()
            for host, port in found[0]:
                store = TCPStore(str(host), port, is_master=False, timeout=timedelta(seconds=30))
                store.set(f"torch.rendezvous.{order.study}-slot0", bomb)  # where torchrun's own rendezvous would read
            time.sleep(1)
            ranks[1].kill()
    finally:
        stop_slots(slots, is_impatient=lambda: False)

    assert not exploded.exists()
    assert list(temporary.glob("torchelastic_*")) == []
