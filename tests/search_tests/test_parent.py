"""A process whose parent is killed ends too, whatever it is doing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from search.processes import is_alive, process_id

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""
CHILD = """
import ctypes, os
from search.processes import exit_with_parent
exit_with_parent(os.getppid())
print(os.getpid(), flush=True)
ctypes.PyDLL(None).sleep(20)  # holds the interpreter's lock, as a call of a driver may
"""


@pytest.mark.multiproc
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_worker_that_holds_the_interpreters_lock_does_not_outlive_its_agent():
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE) as parent:
        child = process_id(int(parent.stdout.readline()))
        time.sleep(0.2)  # it is in the call
        assert is_alive(child)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    was_alive = is_alive(child)
    if was_alive:
        os.kill(child.pid, signal.SIGKILL)

    assert not was_alive
