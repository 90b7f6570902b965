"""A folder is written whole or not at all."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from hyquant.errors import ExportError
from hyquant.export import folder as folder_module
from hyquant.export import resumable
from hyquant.export.folder import new_folder, sha256_of
from hyquant.export.resumable import attempt_place, resumable_folder

MARK = "mark.json"


def is_ours(folder, name):
    return name.startswith("ours")


def write(path, text, *, overwrite=False, size_bytes=0, files=(MARK,)):
    with new_folder(path, size_bytes=size_bytes, mark=MARK, overwrite=overwrite, is_ours=is_ours) as temporary:
        for name in files:
            (temporary / name).write_text(text)


def write_half(path, *, overwrite):
    with new_folder(path, size_bytes=0, mark=MARK, overwrite=overwrite, is_ours=is_ours) as temporary:
        (temporary / MARK).write_text("half")
        raise RuntimeError


def test_the_folder_appears_with_all_its_files(tmp_path):
    write(tmp_path / "deep" / "out", "one")

    assert (tmp_path / "deep" / "out" / MARK).read_text() == "one"


def test_an_error_inside_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "out", overwrite=False)

    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_leaves_the_old_folder(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "out", overwrite=True)

    assert (tmp_path / "out" / MARK).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_old_folder_is_replaced_and_nothing_else_remains(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(folder_module, "_exchange", lambda one, other: False)
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "ours.txt").write_text("old too")
    write(tmp_path / "out", "new", overwrite=True)

    assert (tmp_path / "out" / MARK).read_text() == "new"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MARK]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "one")

    assert (tmp_path / "out" / MARK).read_text() == "one"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ExportError, match="is something else"):
        write(tmp_path / "out", "one", overwrite=True)

    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("path", [".", "", "../here"])
def test_the_current_folder_is_refused(tmp_path, monkeypatch, path):
    """Who stands in it would stand in a folder that is gone."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ExportError, match="is the current folder; give another path"):
        write(Path(path), "one")
    write(Path("export"), "one")

    assert [path.name for path in tmp_path.rglob("*")] == ["here", "export", MARK]


def test_too_little_space_is_seen_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(100 * 2**20, 60 * 2**20, 40 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match=r"needs about 50 MiB, but .* has 40 MiB free; make room"):
        write(tmp_path / "out", "one", size_bytes=50 * 2**20)

    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_one_sentence(tmp_path):
    with (
        pytest.raises(ExportError, match=r"disk of .* is full .*; nothing was written"),
        new_folder(tmp_path / "out", size_bytes=0, mark=MARK, overwrite=False, is_ours=is_ours),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "parent").write_text("a file")

    with pytest.raises(ExportError, match="cannot be written"):
        write(tmp_path / "parent" / "out", "one")


def test_files_of_others_in_an_export_are_never_deleted(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(ExportError, match=r"also holds thesis\.tex; move that away"):
        write(tmp_path / "out", "new", overwrite=True)

    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "out" / MARK).read_text() == "old"


def test_a_file_that_outgrows_its_limit_leaves_the_old_folder(tmp_path):
    """A write that really fails halfway: no file may pass 64 KiB, as on a disk that fills up."""
    write(tmp_path / "out", "old")
    program = (
        "import resource, sys\nfrom pathlib import Path\nimport torch\n"
        "from hyquant.errors import ExportError\nfrom hyquant.export.folder import new_folder\n"
        "from hyquant.export.tensor_file import write_tensor_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    with new_folder(Path(sys.argv[1]), size_bytes=0, mark='mark.json', overwrite=True, "
        "is_ours=lambda folder, name: False) as folder:\n"
        "        write_tensor_file(folder / 'big.safetensors', {'x': torch.zeros(100000)})\n"
        "except ExportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], timeout=120, capture_output=True, text=True
    )

    assert "cannot be written" in done.stdout, done.stderr
    assert (tmp_path / "out" / MARK).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def write_by_attempts(path, identity, *, overwrite=True):
    with resumable_folder(
        path, identity=identity, size_bytes=0, mark=MARK, overwrite=overwrite, is_ours=is_ours
    ) as attempt:
        if not attempt.entries:
            (attempt.folder / MARK).write_text(identity)
            attempt.note({"of": identity})


@pytest.mark.parametrize("old", [None, "an older one"])
def test_a_kill_just_after_the_new_folder_got_its_name_mixes_nothing_into_the_next(tmp_path, monkeypatch, old):
    """An interrupt stands for the kill: it leaves everything too."""
    out, swap_in = tmp_path / "out", resumable.swap_in
    if old is not None:
        write(out, old, files=(MARK, "ours.txt"))

    def killed(new, path):
        swap_in(new, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(resumable, "swap_in", killed)
    with pytest.raises(KeyboardInterrupt):
        write_by_attempts(out, "new")
    monkeypatch.undo()

    assert (out / MARK).read_text() == "new"
    assert attempt_place(out).is_dir()
    write_by_attempts(out, "new")

    assert {file.name: file.read_text() for file in out.iterdir()} == {MARK: "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_journal_whose_folder_is_gone_starts_anew(tmp_path):
    place = attempt_place(tmp_path / "out")
    place.mkdir()
    (place / "journal.jsonl").write_text('{"identity": "one"}\n{"of": "one"}\n')

    write_by_attempts(tmp_path / "out", "one")

    assert (tmp_path / "out" / MARK).read_text() == "one"


@pytest.mark.multiproc
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_writer_killed_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch, can_exchange):
    """Without an exchange of names a kill may fall between two renames; then the next writer puts the old one back."""
    if not can_exchange:
        monkeypatch.setattr(folder_module, "_exchange", lambda one, other: False)
    out, files = tmp_path / "out", (MARK, "ours.a", "ours.b")
    write(out, "start", files=files)
    for delay_ms in range(1, 41):
        child = os.fork()
        if child == 0:
            for number in itertools.count():
                write(out, f"version {number}", overwrite=True, files=files)
        time.sleep(delay_ms / 1000)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        folder = out if can_exchange or out.exists() else tmp_path / ".out.hyq-old"

        assert len({(folder / name).read_text() for name in files}) == 1
    write(out, "end", overwrite=True, files=files)

    assert {(out / name).read_text() for name in files} == {"end"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_living_writer_has_begun_is_not_cleared_away(tmp_path):
    with new_folder(tmp_path / "out", size_bytes=0, mark=MARK, overwrite=True, is_ours=is_ours) as slow:
        (slow / MARK).write_text("slow")
        write(tmp_path / "out", "fast")

        assert slow.is_dir()
    assert (tmp_path / "out" / MARK).read_text() == "slow"


def test_the_slower_of_two_writers_does_not_replace_what_it_may_not(tmp_path):
    slow = new_folder(tmp_path / "out", size_bytes=0, mark=MARK, overwrite=False, is_ours=is_ours)
    (slow.__enter__() / MARK).write_text("slow")
    write(tmp_path / "out", "fast")
    with pytest.raises(ExportError, match="holds an export already"):
        slow.__exit__(None, None, None)

    assert (tmp_path / "out" / MARK).read_text() == "fast"


def test_sha256_is_that_of_the_bytes(tmp_path):
    """The published digest of "abc" (FIPS 180-2, appendix B.1)."""
    (tmp_path / "abc").write_bytes(b"abc")

    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
