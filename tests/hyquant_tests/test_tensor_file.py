"""The safetensors files we write are what safetensors reads, whatever the shapes and wherever a writer stopped."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hyquant.export.tensor_file import TensorFile, file_layout, spec_of, write_tensor_file


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randint(-127, 128, (6, 8), generator=generator, dtype=torch.int8),
        "odd": torch.randint(-127, 128, (3, 5), generator=generator, dtype=torch.int8),
        "one scale": torch.randn(1, generator=generator),
        "no dims": torch.tensor(2.5),
        "nothing": torch.zeros(0, 4),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "scales": torch.randn(6, 1, generator=generator),
        "bits": torch.randint(0, 2**40, (3,), generator=generator),
    }


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    info = write_tensor_file(tmp_path / "x.safetensors", tensors())
    found = load_file(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()

    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors().items())
    assert all(found[key].dtype == tensor.dtype for key, tensor in tensors().items())
    assert info.size_bytes == len(content)
    assert info.sha256 == hashlib.sha256(content).hexdigest()


def test_every_tensor_is_aligned_to_its_elements(tmp_path):
    write_tensor_file(tmp_path / "x.safetensors", tensors())
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    places = {key: entry["data_offsets"] for key, entry in json.loads(content[8 : 8 + length]).items()}

    assert (8 + length) % 8 == 0
    assert all(places[key][0] % tensor.element_size() == 0 for key, tensor in tensors().items())


def test_the_given_order_is_kept_where_alignment_lets_it():
    specs = {key: spec_of(tensor) for key, tensor in tensors().items()}

    assert list(file_layout(specs).places) == [
        *("weight", "nothing", "scales", "bits"),
        *("one scale", "no dims", "half", "odd"),
    ]


@pytest.mark.parametrize("stop", ["weight", "scales"])
def test_a_file_that_was_left_unfinished_is_completed_to_the_same_bytes(tmp_path, stop):
    whole = write_tensor_file(tmp_path / "whole.safetensors", tensors())
    specs = {key: spec_of(tensor) for key, tensor in tensors().items()}
    path = tmp_path / "part.safetensors"
    with TensorFile(path, specs) as file:
        file.start()
        for key in file.layout.places:
            file.put(key, tensors()[key])
            if key == stop:
                break
        reached = file.position, file.running_sha256()
    with path.open("ab") as rest:
        rest.write(b"half a tensor")

    with TensorFile(path, specs) as file:
        assert not file.resume(reached[0], "0" * 64)
        assert file.resume(*reached)
        for key, (start, _) in file.layout.places.items():
            if start >= reached[0]:
                file.put(key, tensors()[key])
        finished = file.finish()

    assert finished == whole
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == set(tensors())
