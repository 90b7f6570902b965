"""A store on a small file system that fills up in the middle of a study and is emptied later."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml

from search.mlflow_client import prepare_store
from search.repair import agreement
from search.runner import run_study
from search.storage import open_study
from search.study_file import load_study
from search.trials import count_states
from tests.integration.test_failing_configs import STUDY

pytestmark = [pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(1200)]

SIZE_MIB = 260
FULL = "waiting for room: results of trials need at least 1 MiB, but "
TOLD_S = 120
"""The run looks at the disk twice a second; so long a busy machine may take for two looks."""
WRITTEN_DOWN_S = 10
"""How long the trial in hand goes on with a full disk; it takes a second to its result. With less, less is tested."""


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("a file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with path.open("wb", buffering=0) as file:
        for size in (2**20, 4096):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def test_a_store_that_fills_up_and_is_emptied_loses_nothing(small_disk, tmp_path, monkeypatch, faults):
    """The second trial is in hand when the disk fills up, and goes on when the run has said that it is full."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "calibration.txt").write_text("one red cube\ntwo blue balls\n")
    (tmp_path / "search.txt").write_text("a green cone\na grey ring\n")
    path, store, ballast = tmp_path / "study.yaml", small_disk / "mlruns", small_disk / "ballast"
    path.write_text(yaml.safe_dump({**STUDY, "store": str(store), "slots": [{"ranks": 2}]}))
    prepare_store(store)
    faults.set({"what": "hold", "skip": 1})
    told: list[str] = []
    waiting, is_over = threading.Event(), threading.Event()

    def fill_and_empty() -> None:
        while not (faults.has_struck() or is_over.is_set()):
            time.sleep(0.1)
        fill(ballast)
        waiting.wait(TOLD_S)
        faults.set()
        time.sleep(WRITTEN_DOWN_S)
        ballast.unlink()

    def on_event(event) -> None:
        told.append(event.message)
        if event.message.startswith(FULL):
            waiting.set()

    thread = threading.Thread(target=fill_and_empty)
    thread.start()
    try:
        run_study(load_study(path), study_file=path, on_event=on_event)
    finally:
        is_over.set()
        waiting.set()
        thread.join()

    study = open_study(store, STUDY["name"])
    assert [message for message in told if message.startswith(FULL)]
    assert count_states(study) == {**count_states(study), "complete": 4, "running": 0, "waiting": 0}
    assert agreement(store, study) == ()
    assert not [message for message in told if "stopped" in message]
