import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from search.locks import FileLock, HostLock, at_work, held_by_workers


@pytest.fixture
def make_lock(tmp_path):
    """Locks on one file, released when the test ends."""
    locks = []

    def make():
        locks.append(FileLock(tmp_path / "a.lock"))
        return locks[-1]

    yield make
    for lock in locks:
        lock.release()


def test_an_exclusive_lock_is_refused_while_another_holds_it(make_lock):
    first, second = make_lock(), make_lock()

    assert first.acquire(blocking=False)
    assert not second.acquire(blocking=False)
    first.release()
    assert second.acquire(blocking=False)


def test_shared_locks_go_together_and_keep_an_exclusive_one_out(make_lock):
    assert make_lock().acquire(shared=True)
    assert make_lock().acquire(shared=True)
    assert not make_lock().acquire(blocking=False)


def test_commands_at_work_are_seen_each_and_only_while_they_are(tmp_path):
    def seen():
        return sorted(path.name for path in held_by_workers(tmp_path))

    with at_work(tmp_path, "export"), at_work(tmp_path, "certify"):
        with at_work(tmp_path, "export"):
            three = seen()
        two = seen()

    assert three == ["certify-0.lock", "export-0.lock", "export-1.lock"]
    assert two == ["certify-0.lock", "export-0.lock"]
    assert seen() == []


def test_a_store_that_takes_no_lock_is_used_without_one(tmp_path):
    (tmp_path / "locks").touch()
    with at_work(tmp_path, "export"):
        assert list(held_by_workers(tmp_path)) == []


HOLDER = """
import pathlib, sys, time
from search.locks import HostLock
with HostLock(pathlib.Path(sys.argv[1])).measuring():
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.mark.multiproc
def test_the_kernel_releases_the_lock_of_a_killed_process(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"holding\n"
        os.kill(holder.pid, signal.SIGKILL)

    with HostLock(tmp_path).computing():
        pass


def test_a_measurement_waits_for_a_step_not_for_a_trial_and_then_runs_alone(tmp_path):
    """Two slots render without end; a writer that were starved would never get in."""
    steps, is_stopped = [], threading.Event()

    def render():
        lock = HostLock(tmp_path)
        with lock.computing():
            while not is_stopped.is_set():
                time.sleep(0.002)
                steps.append(1)
                lock.let_measurements_pass()

    slots = [threading.Thread(target=render) for _ in range(2)]
    for slot in slots:
        slot.start()
    while len(steps) < 20:
        time.sleep(0.001)

    asked = len(steps)
    with HostLock(tmp_path).measuring():
        before = len(steps)
        time.sleep(0.1)
        during = len(steps) - before
    is_stopped.set()
    for slot in slots:
        slot.join(10)

    assert during == 0
    assert before - asked < 1000  # some, until it has the turnstile, and then one of each slot
