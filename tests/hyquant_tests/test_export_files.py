"""The files of an export: their names, a pair per rank, parts of a limited size, what a MindIE target would read."""

import json
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.observe import observe
from hyquant.config import QuantConfig, W8A8Dynamic, W8A8Timestep
from hyquant.errors import ExportError
from hyquant.export import (
    FileNames,
    default_names,
    for_rank,
    load_quantized,
    model_info,
    read_manifest,
    save_quantized,
    verify_export,
)
from hyquant.models.base import RenderSettings
from hyquant.models.tiny import TinyVideoModel
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, restore_

SETTINGS = RenderSettings(height=16, width=16, num_frames=5, num_steps=2)
NAMES = default_names("W8A8_DYNAMIC")


@pytest.fixture(scope="module")
def model():
    return TinyVideoModel(0)


@pytest.fixture
def save(model, tmp_path):
    """Save the dynamically quantized model, and return the folder; float again afterwards."""

    def saved(**options):
        plan = build_plan(model.groups(), QuantConfig(linear=W8A8Dynamic()), num_steps=2)
        quantize_(model.denoiser, plan, {}, model.clock)
        save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model), **options)
        return tmp_path / "export"

    yield saved
    restore_(model.denoiser)


def rendered(folder):
    fresh = TinyVideoModel(0)
    load_quantized(fresh.denoiser, folder, fresh.clock)
    return fresh.render(["a red ball"], [1], SETTINGS)[0]


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_default_names_are_those_of_the_contract():
    assert default_names("W8A8_TIMESTEP") == FileNames(
        weights="quant_model_weight_w8a8_timestep.safetensors",
        description="quant_model_description_w8a8_timestep.json",
    )
    assert for_rank(default_names("W8A8"), 7) == FileNames(
        weights="quant_model_weight_w8a8_7.safetensors", description="quant_model_description_w8a8_7.json"
    )


@pytest.mark.parametrize(
    "bad", ["", ".safetensors", "../x.safetensors", "a/b.safetensors", ".x.safetensors", "x.bin", "a\\b.safetensors"]
)
def test_a_name_that_leaves_the_folder_or_is_no_tensor_file_is_refused(bad):
    with pytest.raises(ValidationError, match="name no folder"):
        FileNames(weights=bad, description="x.json")


def test_the_manifests_name_is_taken():
    with pytest.raises(ValidationError, match="is the manifest's name"):
        FileNames(weights="x.safetensors", description="hyq_manifest.json")


def test_every_rank_gets_the_same_bytes_under_its_own_name(save, model):
    folder = save(names=[for_rank(NAMES, rank) for rank in range(2)], target="mindie-sd-3.1/910b")

    assert files_of(folder) == [
        "hyq_manifest.json",
        "quant_model_description_w8a8_dynamic_0.json",
        "quant_model_description_w8a8_dynamic_1.json",
        "quant_model_weight_w8a8_dynamic_0.safetensors",
        "quant_model_weight_w8a8_dynamic_1.safetensors",
    ]
    one, other = (folder / f"quant_model_weight_w8a8_dynamic_{rank}.safetensors" for rank in range(2))
    assert one.read_bytes() == other.read_bytes()
    assert "quant_model_description_w8a8_dynamic_0.json" in str(read_manifest(folder).loader)
    assert verify_export(folder, model).problems == ()
    assert torch.equal(rendered(folder), rendered_again(model))


def rendered_again(model):
    """Render what was quantized before it went to disk."""
    plan = build_plan(model.groups(), QuantConfig(linear=W8A8Dynamic()), num_steps=2)
    quantize_(model.denoiser, plan, {}, model.clock)
    return model.render(["a red ball"], [1], SETTINGS)[0]


def test_ranks_whose_files_differ_are_a_problem(save):
    folder = save(names=[for_rank(NAMES, rank) for rank in range(2)])
    manifest = json.loads((folder / "hyq_manifest.json").read_text())
    manifest["files"]["quant_model_weight_w8a8_dynamic_1.safetensors"]["sha256"] = "0" * 64
    (folder / "hyq_manifest.json").write_text(json.dumps(manifest))

    problems = verify_export(folder).problems

    assert any("ranks share one config, but it differs" in problem for problem in problems)


def test_parts_hold_every_tensor_once_and_no_more_bytes_than_allowed(save, model):
    limit = 40_000
    folder = save(part_size_bytes=limit)
    parts = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "quant_model_weight_w8a8_dynamic.safetensors.index.json").read_text())
    tensors = {part.name: load_file(part) for part in parts}
    sizes = {
        name: sum(tensor.numel() * tensor.element_size() for tensor in held.values()) for name, held in tensors.items()
    }

    assert len(parts) > 2
    assert [part.name for part in parts] == [
        f"quant_model_weight_w8a8_dynamic-{number:05d}-of-{len(parts):05d}.safetensors"
        for number in range(1, len(parts) + 1)
    ]
    assert all(size <= limit or len(tensors[name]) == 1 for name, size in sizes.items())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"] == {key: name for name, held in tensors.items() for key in held}
    assert verify_export(folder, model).problems == ()
    assert torch.equal(rendered(folder), rendered_again(model))


def test_a_model_that_fits_one_part_has_no_index(save):
    assert files_of(save(part_size_bytes=10**9)) == [
        "hyq_manifest.json",
        "quant_model_description_w8a8_dynamic.json",
        "quant_model_weight_w8a8_dynamic.safetensors",
    ]


def drop_part(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def empty_index(folder):
    next(folder.glob("*.index.json")).write_text("{}")


def leave_the_folder(folder):
    next(folder.glob("*.index.json")).write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))


def move_a_tensor(folder):
    one = min(folder.glob("*.safetensors"))
    tensors = load_file(one)
    save_file({"stray": tensors.pop(next(iter(tensors)))} | tensors, one)
    one.chmod(0o640)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop_part, r"-of-.* must be a regular file, but it is missing"),
        (empty_index, r"index.json must say which part holds which tensor"),
        (leave_the_folder, r"index.json must say which part holds which tensor"),
        (move_a_tensor, r"must list the tensors of its parts, but they differ in"),
    ],
    ids=["a missing part", "an empty index", "an index that leaves the folder", "a tensor the index lacks"],
)
def test_damaged_parts_are_named(save, damage, expected):
    folder = save(part_size_bytes=40_000)
    damage(folder)
    problems = verify_export(folder).problems

    assert any(re.search(expected, problem) for problem in problems), problems
    with pytest.raises(ExportError, match="must be intact"):
        rendered(folder)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"part_size_bytes": 40_000}, "reads one tensor file and no parts"),
        (
            {"names": [FileNames(weights="mine.safetensors", description="mine.json")]},
            "from quant_model_weight_w8a8_dynamic.safetensors, but they were to be written to mine.safetensors",
        ),
        (
            {"names": [FileNames(weights=NAMES.weights, description="quant_model_description_w8a8_dynamic_3.json")]},
            "from quant_model_weight_w8a8_dynamic_3.safetensors",
        ),
    ],
    ids=["parts", "other names", "a rank in one name only"],
)
def test_a_mindie_target_gets_no_files_that_it_would_not_find(save, tmp_path, options, expected):
    with pytest.raises(ExportError, match=expected):
        save(target="mindie-sd-3.1/910b", **options)

    assert list(tmp_path.iterdir()) == []


def test_names_of_ones_own_load_in_this_library(save, model):
    folder = save(names=[FileNames(weights="mine.safetensors", description="mine.json")])

    assert files_of(folder) == ["hyq_manifest.json", "mine.json", "mine.safetensors"]
    assert verify_export(folder, model).ok
    save(names=[NAMES], overwrite=True)
    assert "mine.json" not in files_of(folder)


@pytest.mark.parametrize("names", [[], [NAMES, NAMES]], ids=["none", "one twice"])
def test_names_must_be_given_once(save, names):
    with pytest.raises(ExportError, match="each name once"):
        save(names=names)


def test_a_part_must_hold_something(save):
    with pytest.raises(ExportError, match="part_size_bytes must be 1 or more, but got 0"):
        save(part_size_bytes=0)


def test_a_timestep_manifest_tells_the_engine_which_steps_are_static(model, tmp_path):
    """The lines are run against a stand-in that has the engine's signatures (mindiesd 3.1)."""
    plan = build_plan(model.groups(), QuantConfig(linear=W8A8Timestep(timestep_sep=1)), num_steps=2)
    records = capture_in_memory(model, ["a red ball"], [1], SETTINGS)
    quantize_(model.denoiser, plan, observe(model.denoiser, model.groups(), records, model.clock), model.clock)
    manifest = save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model))
    restore_(model.denoiser)
    called = {}

    class TimestepPolicyConfig:
        def register(self, step_range, strategy, target):
            called["policy"] = (step_range, strategy, target)

    def quantize(transformer, quant_des_path, *, dtype, timestep_config):
        called["path"], called["dtype"] = quant_des_path, dtype
        return transformer

    lines = str(manifest.loader).replace("from mindiesd import", "# from mindiesd import")
    exec(
        lines,
        {
            "TimestepPolicyConfig": TimestepPolicyConfig,
            "quantize": quantize,
            "transformer": model.denoiser,
            "export_dir": tmp_path / "export",
        },
    )

    assert called["policy"] == (range(1, 2), "static", "w8a8_static_linear")
    assert called["dtype"] is torch.bfloat16
    assert json.loads(Path(called["path"]).read_text())["model_quant_type"] == "W8A8_TIMESTEP"
