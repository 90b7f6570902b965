"""`docs/migrating.md`: its imports exist, its script runs, and it speaks of every name of the session API."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import hyquant
from hyquant.modules.swap import quantized_tensors
from tests.toys.pipelines import load_pipeline

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
SESSION_NAMES = {name for name, home in hyquant._HOMES.items() if home.startswith("hyquant.session.")}


def imports(column):
    rows = re.findall(r"^\| `from (\S+) import ([^`]+)` \| `from (\S+) import ([^`]+)` \|$", TEXT, flags=re.MULTILINE)
    return [(row[2 * column], row[2 * column + 1].split(", ")) for row in rows]


def test_every_new_import_line_has_the_names_of_the_old_one_and_works():
    assert [names for _, names in imports(0)] == [names for _, names in imports(1)]
    for module, names in imports(1):
        assert all(hasattr(import_module(module), name) for name in names)
    assert {name for _, names in imports(1) for name in names} == SESSION_NAMES


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_examples_run_one_after_another(layout, tmp_path, monkeypatch):
    """On a toy of either layout in place of the pipeline."""
    monkeypatch.chdir(tmp_path)
    names = {"pipeline": load_pipeline(layout)}

    quantized = []
    for block in BLOCKS:
        exec(compile(block, "docs/migrating.md", "exec"), names)
        quantized.append(quantized_tensors(names["model"]))

    assert len(BLOCKS) == 3
    assert len(names["report"].layers) == 18
    assert quantized[0].keys() == quantized[1].keys()
    for path, tensors in quantized[0].items():
        assert all(torch.equal(quantized[1][path][name], tensor) for name, tensor in tensors.items())
    assert len(next(iter(quantized[2].values()))["input_scale"]) == 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


def test_every_table_of_differences_names_what_exists():
    """Options named as `option=value` in the right-hand column are fields of some session config."""
    fields = {field for name in SESSION_NAMES for field in getattr(getattr(hyquant, name), "model_fields", ())}
    rows = re.findall(r"^\| .+ \| .+ \| (.+) \|$", TEXT.partition("## What is different")[2], flags=re.MULTILINE)
    named = {option for row in rows for option in re.findall(r"`(\w+)=", row)}

    assert {"calibration", "rows", "disable_last_linear", "overwrite", "layers"} <= named <= fields
