import json
import os

import pytest
import torch

from hyquant.kernels.selection import FORCED, LinearShape
from hyquant.kernels.x86_attention import attends_natively
from search import kernels
from search.cli import exit_code_of


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "usual_shapes", lambda: [LinearShape(24, 16, 8), LinearShape(7, 5, 8)])
    monkeypatch.setattr(kernels, "HEADS", ((2, 8),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(FORCED, raising=False)


def test_the_table_says_which_kernel_each_shape_gets(capsys):
    assert exit_code_of(["doctor", "--kernels", "--json"]) == 0

    rows = json.loads(capsys.readouterr().out)
    assert {row["shape"] for row in rows} == {"8x16->24", "8x5->7", "attention 2x1024x8"}
    for shape in {row["shape"] for row in rows}:
        mine = [row for row in rows if row["shape"] == shape]
        (chosen,) = [row for row in mine if row["is_chosen"]]
        if shape.startswith("attention"):
            assert chosen["kernel"] == ("vnni" if attends_natively(torch.device("cpu"), 8) else "float")
        else:
            assert chosen["time_s"] == min(row["time_s"] for row in mine)
    assert exit_code_of(["doctor", "--kernels"]) == 0
    assert "8x16->24" in capsys.readouterr().out


def test_the_shapes_of_a_model_are_those_of_its_joined_groups():
    shapes, heads = kernels.model_shapes("tiny", "0", device="cpu", dtype="float32")

    assert len(shapes) == len(set(shapes))
    assert all(shape.num_outputs > 0 and shape.num_inputs > 0 for shape in shapes)
    assert heads == [(2, 16)]


def test_a_kernel_is_forced_for_this_process_and_those_it_starts():
    kernels.force_kernel(None, "cpu")
    assert FORCED not in os.environ

    kernels.force_kernel("reference", "cpu")
    assert os.environ.pop(FORCED) == "reference"


def test_an_unknown_kernel_is_refused_before_anything_runs(capsys, tmp_path):
    code = exit_code_of(["run", "studies/mini.yaml", "--store", str(tmp_path / "store"), "--kernel", "fast"])

    assert code == 1
    assert "must run on cpu here, but got 'fast'" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
