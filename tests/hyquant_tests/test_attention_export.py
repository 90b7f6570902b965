"""Exports with quantized attention: what is loaded is what was saved, and damage is named."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyquant.attention.observe import observe_attention
from hyquant.config import FA3Fp8, FA3Int8, LayerSelection, QuantConfig, W8A8Dynamic
from hyquant.errors import ExportError
from hyquant.export import load_quantized, model_info, save_quantized, verify_export
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import RenderSettings
from hyquant.models.tiny import TinyVideoModel
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, restore_

SETTINGS = RenderSettings(height=16, width=16, num_frames=5, num_steps=2)
DYNAMIC = W8A8Dynamic()
INT8 = QuantConfig(linear=DYNAMIC, attention=FA3Int8(layers=("*double_blocks*", "*single_blocks.1")))
FP8 = QuantConfig(linear=DYNAMIC, attention=FA3Fp8(), layers=LayerSelection(exclude=("*mod*",)))
CONFIGS = {
    "int8": INT8,
    "fp8": FP8,
    "fp8 unrotated": QuantConfig(linear=DYNAMIC, attention=FA3Fp8(rotate=False)),
    "fp8 alone": QuantConfig(linear=None, attention=FA3Fp8(), deploy_dtype="float16"),
}


@pytest.fixture(scope="module")
def loaded():
    model = TinyVideoModel(0)
    records = []
    model.capture(["a red ball"], [1], SETTINGS, records.append)
    blocks = attention_blocks(model.denoiser)
    return model, observe_attention(model.denoiser, blocks, records, model.clock, FA3Int8())


@pytest.fixture
def export(loaded, tmp_path):
    """Quantize by a configuration and save; the model stays quantized until the test ends."""
    model, stats = loaded
    blocks = attention_blocks(model.denoiser)

    def write(config, **kwargs):
        plan = build_plan(model.groups(), config, num_steps=SETTINGS.num_steps, attentions=blocks)
        quantize_(model.denoiser, plan, {}, model.clock, attention_stats=stats)
        manifest = save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model), **kwargs)
        return tmp_path / "export", manifest

    yield write
    restore_(model.denoiser)


def read(folder):
    (weights,) = folder.glob("*.safetensors")
    (description,) = folder.glob("quant_model_description_*.json")
    return load_file(weights), json.loads(description.read_text())


def rewrite(folder, change):
    """Change the tensors and make the manifest agree, as a faulty exporter would."""
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    weights.chmod(0o640)
    path = folder / "hyq_manifest.json"
    manifest = json.loads(path.read_text())
    data = weights.read_bytes()
    manifest["files"][weights.name] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_loaded_renders_what_was_saved(loaded, export, name, layout):
    model, _ = loaded
    folder, manifest = export(CONFIGS[name], layout=layout)
    (video,) = model.render(["a red ball"], [1], SETTINGS)
    fresh = TinyVideoModel(0)

    plan = load_quantized(fresh.denoiser, folder, fresh.clock)
    (again,) = fresh.render(["a red ball"], [1], SETTINGS)
    restore_(fresh.denoiser)
    (plain,) = fresh.render(["a red ball"], [1], SETTINGS)

    assert plan == manifest.plan
    assert torch.equal(again, video)
    assert not torch.equal(plain, video)
    assert verify_export(folder, fresh).problems == ()


def test_int8_attention_is_described_as_the_seed_does_but_per_head(export):
    folder, manifest = export(INT8)

    tensors, description = read(folder)

    blocks = ("double_blocks.0", "double_blocks.1", "single_blocks.1")
    keys = {f"{block}.fa_{part}.{kind}" for block in blocks for part in "qkv" for kind in ("scale", "offset")}
    assert {key for key, value in description.items() if value == "FAQuant"} == keys | {"fa_quant_type"}
    assert description["model_quant_type"] == "W8A8_DYNAMIC"
    assert set(description) - {"fa_quant_type", "model_quant_type"} == set(tensors)
    for key in keys:
        expected = torch.float32 if key.endswith("scale") else torch.int8
        assert (tensors[key].shape, tensors[key].dtype) == ((2, 1), expected)
    scale = tensors["double_blocks.0.fa_q.scale"]
    assert torch.equal(scale, scale.bfloat16().float())
    assert manifest.layer_counts["fa3_int8 attention"] == 3
    assert any("MindIE-SD 3.1 ignores FAQuant" in note for note in manifest.notes)


def test_float8_attention_is_described_by_block_and_stores_the_rotation(export):
    folder, manifest = export(FP8)

    tensors, description = read(folder)

    types = {key: value for key, value in description.items() if key.endswith(".quant_type")}
    blocks = [f"{kind}_blocks.{index}" for kind in ("double", "single") for index in range(2)]
    assert types == {f"{block}.quant_type": "FP8_DYNAMIC" for block in blocks}
    assert "fa_quant_type" not in description
    for block in blocks:
        q_rot, k_rot = tensors[f"{block}.q_rot"], tensors[f"{block}.k_rot"]
        assert q_rot.dtype == torch.bfloat16
        assert torch.equal(q_rot.float() @ k_rot.float().T, torch.eye(16))
        assert description[f"{block}.q_rot"] == description[f"{block}.k_rot"] == "FLOAT"
    assert set(description) - set(types) - {"model_quant_type"} == set(tensors)
    assert any("self.fa_quant" in note for note in manifest.notes)


def test_float8_attention_alone_has_a_type_of_its_own(export):
    folder, manifest = export(CONFIGS["fp8 alone"])

    assert manifest.model_quant_type == "FP8_DYNAMIC"
    assert (folder / "quant_model_weight_fp8_dynamic.safetensors").is_file()
    assert read(folder)[0]["double_blocks.0.q_rot"].dtype == torch.float16


def test_an_export_without_attention_has_neither_notes_nor_types(export):
    folder, manifest = export(QuantConfig(linear=DYNAMIC))

    assert manifest.notes == ()
    assert not any("quant_type" in key for key in read(folder)[1] if key != "model_quant_type")


def test_int8_attention_alone_cannot_be_exported(export):
    with pytest.raises(ExportError, match=r"int8 attention must quantize a Linear too.*add w8a8_dynamic"):
        export(QuantConfig(linear=None, attention=FA3Int8()))


@pytest.mark.parametrize(
    ("name", "target", "sentence"),
    [
        ("int8", "mindie-sd-3.1/910b", "ignores int8 attention without a message.*mindie-sd-2.3/910b"),
        ("int8", "mindie-sd-3.1/950", "ignores int8 attention without a message"),
        ("fp8", "mindie-sd-3.1/910b", "has no float8 attention.*mindie-sd-3.1/950"),
        ("fp8", "mindie-sd-2.3/910b", "has no float8 attention"),
    ],
)
def test_a_target_that_cannot_run_it_is_refused(export, name, target, sentence):
    with pytest.raises(ExportError, match=sentence):
        export(CONFIGS[name], target=target)


@pytest.mark.parametrize(("name", "target"), [("int8", "mindie-sd-2.3/910b"), ("fp8", "mindie-sd-3.1/950")])
def test_a_target_that_runs_it_is_written(export, name, target):
    assert export(CONFIGS[name], target=target)[1].target == target


def test_a_denoiser_without_the_planned_attention_is_not_saved(loaded, export, tmp_path):
    model, _ = loaded
    _, manifest = export(INT8)
    without = manifest.plan.model_copy(update={"attentions": manifest.plan.attentions[:1]})

    with pytest.raises(ExportError, match="has 3 quantized attentions and the plan 1"):
        save_quantized(model.denoiser, without, tmp_path / "other", model=model_info(model))


def drop(key):
    return lambda tensors: tensors.pop(key)


def put(key, change):
    return lambda tensors: tensors.update({key: change(tensors[key])})


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("int8", drop("double_blocks.0.fa_k.scale"), "fa_k.scale of the attention of double_blocks.0 must be there"),
        ("int8", put("single_blocks.1.fa_v.scale", lambda x: x.repeat(7, 1)), r"shape \(2, 1\), but has \(14, 1\)"),
        ("int8", put("double_blocks.0.fa_q.scale", torch.neg), "fa_q.scale must be positive, but has 2"),
        ("int8", put("double_blocks.0.fa_q.offset", lambda x: x + 1), "fa_q.offset must be zero"),
        ("int8", put("double_blocks.0.fa_q.offset", torch.Tensor.float), "fa_q.offset must be torch.int8"),
        ("fp8", put("double_blocks.1.k_rot", lambda x: x * 2), "q_rot times .* must be the identity, but is off by 1"),
        ("fp8", put("double_blocks.1.k_rot", torch.Tensor.float), "k_rot must be torch.bfloat16"),
        ("fp8", drop("single_blocks.0.q_rot"), "single_blocks.0.q_rot of the attention .* must be there"),
    ],
)  # fmt: skip
def test_a_damaged_attention_is_named(export, name, change, problem):
    folder, _ = export(CONFIGS[name])
    rewrite(folder, change)

    report = verify_export(folder)

    assert not report.ok
    assert any(re.search(problem, found) for found in report.problems), report.problems
    with pytest.raises(ExportError, match="must be intact"):
        load_quantized(TinyVideoModel(0).denoiser, folder, TinyVideoModel(0).clock)
