"""A folder is written whole or not at all."""

import errno
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError

from hyquant.errors import ExportError
from hyquant.export import folder as folder_module
from hyquant.export import writer
from hyquant.export.folder import new_folder, sha256_of

MARK = "mark.json"


def write(path, text, *, overwrite=False, size_bytes=0):
    with new_folder(path, size_bytes=size_bytes, mark=MARK, overwrite=overwrite) as temporary:
        (temporary / MARK).write_text(text)


def write_half(path, *, overwrite):
    with new_folder(path, size_bytes=0, mark=MARK, overwrite=overwrite) as temporary:
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
    (tmp_path / "out" / "extra").write_text("old too")
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


def test_too_little_space_is_seen_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(100 * 2**20, 60 * 2**20, 40 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match=r"needs about 50 MiB, but .* has 40 MiB free; make room"):
        write(tmp_path / "out", "one", size_bytes=50 * 2**20)

    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_one_sentence(tmp_path):
    with (
        pytest.raises(ExportError, match=r"disk of .* is full .*; nothing was written"),
        new_folder(tmp_path / "out", size_bytes=0, mark=MARK, overwrite=False),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert list(tmp_path.iterdir()) == []


def test_safetensors_own_report_of_a_full_disk_is_understood(tmp_path, monkeypatch):
    def full(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writer, "save_file", full)

    with pytest.raises(OSError, match="No space left") as caught:
        writer._write_tensors(tmp_path / "x", {"a": torch.zeros(1)})

    assert caught.value.errno == errno.ENOSPC


def test_a_parent_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "parent").write_text("a file")

    with pytest.raises(ExportError, match="cannot be written"):
        write(tmp_path / "parent" / "out", "one")


@pytest.mark.multiproc
def test_a_killed_writer_leaves_no_folder_under_the_name(tmp_path):
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom hyquant.export.folder import new_folder\n"
        "with new_folder(Path(sys.argv[1]), size_bytes=0, mark='mark.json', overwrite=False) as folder:\n"
        "    (folder / 'mark.json').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], timeout=120)

    assert finished.returncode == -9
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out", "one")
    assert (tmp_path / "out" / MARK).read_text() == "one"


def test_sha256_is_that_of_the_bytes(tmp_path):
    """The published digest of "abc" (FIPS 180-2, appendix B.1)."""
    (tmp_path / "abc").write_bytes(b"abc")

    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
