"""Damaged inputs of every kind, given where users give them: each is refused by a sentence, and nothing is lost.

What counts as one: the documented exit code within seconds and without a traceback. For exit code 1 the last line on
stderr says rule, value and way out; for 3, where several problems are told apart, each of a few lines does. The
folder's listing and bytes stay as they were, apart from locks, which hold nothing, and SQLite's own files beside
a database.
"""

import hashlib
import os
import shlex
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from search.cli import exit_code_of
from tests.integration.damages import DAMAGES, Damage
from tests.integration.good_inputs import write_good_inputs

MOST_LINES, MOST_LETTERS = 3, 600
MOST_COMPUTING_S, MOST_WAITING_S = 5.0, 20.0  # the second is generous, for machines that are busy
HARMLESS = (".lock", ".db-wal", ".db-shm")
ACCEPTED = (
    "status study.yaml",
    "show study.yaml 0",
    "gc study.yaml",
    "verify export",
    "verify parts",
    "profile --device-profile device.yaml",
    "quantize-checkpoint --in checkpoint --out out --config config.yaml",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_good_inputs(folder)
    for path in (folder / "store").glob("*.db"):
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # or a reader does it later
    return folder


@pytest.fixture
def inputs(good, tmp_path, monkeypatch) -> Path:
    """A copy of the good inputs, which is the current folder; no command may go as far as workers or a server."""
    folder = shutil.copytree(good, tmp_path / "inputs")
    monkeypatch.chdir(folder)
    for name in ("HYQ_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("a server was started"))
    for module in ("runner", "joining"):
        monkeypatch.setattr(f"search.{module}.start_slots", lambda *_, **__: pytest.fail("workers were started"))
    return folder


def content_of(folder: Path) -> dict[str, str]:
    """Return what lies under every name of a folder: the digest of a file, else its kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, mode = str(path.relative_to(folder)), path.lstat().st_mode
        is_file = path.is_file() and not path.is_symlink()
        if not name.endswith(HARMLESS):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else oct(mode)
    return found


def lost_or_left(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Return names that are gone, new or changed, but for folders that hold locks alone."""
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    locks = {name for name in changed if name.endswith("locks")}
    return changed - locks - {str(Path(name).parent) for name in locks}


def test_the_table_is_long_and_its_damages_differ():
    assert len(DAMAGES) >= 60
    assert len({(case.command, case.words) for case in DAMAGES.values()}) > 0.9 * len(DAMAGES)


@pytest.mark.parametrize("command", ACCEPTED)
def test_the_inputs_are_accepted_while_they_are_whole(command, inputs):
    assert exit_code_of(shlex.split(command)) == 0


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_input_is_refused_by_a_sentence(name, inputs, capsys):
    case: Damage = DAMAGES[name]
    case.damage(inputs)
    before = content_of(inputs)

    started, computed = time.monotonic(), time.process_time()
    code = exit_code_of(shlex.split(case.command))
    waited_s, computed_s = time.monotonic() - started, time.process_time() - computed
    out, err = capsys.readouterr()
    told = out + err if case.command.startswith("doctor") else err

    assert code == case.code
    assert "Traceback" not in out + err
    lines = err.splitlines()
    if code == 1:
        assert [line.startswith("hyq-search: ") for line in lines] == [False] * (len(lines) - 1) + [True]
        told = lines[-1]
    assert len(lines) <= MOST_LINES
    assert all(len(line) <= MOST_LETTERS for line in lines)
    assert [word for word in case.words if word not in told] == []
    assert lost_or_left(before, content_of(inputs)) == set()
    assert computed_s < MOST_COMPUTING_S
    assert waited_s < MOST_WAITING_S
