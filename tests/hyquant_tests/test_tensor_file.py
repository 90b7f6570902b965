import hashlib
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hyquant.export.tensor_file import DTYPE_NAMES, write_tensors

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


@settings(deadline=None)
@given(content=st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPE_NAMES)), SHAPES), min_size=1, max_size=12))
def test_the_file_is_the_one_that_the_library_writes(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("files")
    tensors = {
        name: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        for name, (dtype, shape) in content.items()
    }

    sha256 = write_tensors(folder / "ours", tensors)
    save_file(tensors, folder / "theirs")

    written = (folder / "ours").read_bytes()
    assert written == (folder / "theirs").read_bytes()
    assert sha256 == hashlib.sha256(written).hexdigest()


def test_a_large_tensor_is_written_in_pieces(tmp_path):
    tensor = torch.arange(6_000_001, dtype=torch.int32)

    sha256 = write_tensors(tmp_path / "file", {"x": tensor})

    assert torch.equal(load_file(tmp_path / "file")["x"], tensor)
    assert sha256 == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_a_disk_that_does_not_take_it_is_an_os_error_and_the_hashing_ends(tmp_path, monkeypatch):
    def full(handle, piece):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "file", {"x": torch.zeros(3)})
