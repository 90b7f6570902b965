"""Exports: what is loaded renders what was saved, the engine's contract holds, and damage is named."""

import hashlib
import json
import re
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.observe import observe
from hyquant.clock import StepClock
from hyquant.config import M4, LayerSelection, QuantConfig, W8A8Dynamic, W8A8Static, W8A8Timestep
from hyquant.errors import ExportError
from hyquant.export import load_quantized, model_info, read_manifest, save_quantized, verify_export
from hyquant.models.base import RenderSettings
from hyquant.models.tiny import TinyVideoModel
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, restore_

SETTINGS = RenderSettings(height=16, width=16, num_frames=5, num_steps=4)
PROMPTS, SEEDS = ["a red ball", "a blue box that turns"], [1, 2]
SELECTION = LayerSelection(exclude=("*img_mod*", "*modulation*", "*mlp.fc2*"))

LINEARS = {
    "static": W8A8Static(),
    "dynamic": W8A8Dynamic(),
    "timestep": W8A8Timestep(timestep_sep=2),
    "timestep mean": W8A8Timestep(timestep_sep=0, act_method="mean_minmax"),
}
CONFIGS = {name: QuantConfig(linear=linear, layers=SELECTION) for name, linear in LINEARS.items()} | {
    f"m4 {name}": QuantConfig(linear=LINEARS[name], layers=SELECTION, smoothing=M4())
    for name in ("static", "dynamic", "timestep")
}


@pytest.fixture(scope="module")
def model():
    return TinyVideoModel(0)


@pytest.fixture(scope="module")
def stats(model):
    records = capture_in_memory(model, PROMPTS, SEEDS, SETTINGS)
    return observe(model.denoiser, model.groups(), records, model.clock)


@pytest.fixture
def quantized(model, stats):
    """Quantize the model by a configuration, return the plan; float again afterwards."""

    def quantize(config):
        plan = build_plan(model.groups(), config, num_steps=SETTINGS.num_steps)
        quantize_(model.denoiser, plan, stats, model.clock)
        return plan

    yield quantize
    restore_(model.denoiser)


@pytest.fixture(scope="module")
def saved(model, stats, tmp_path_factory):
    """A good export of a time-step configuration, with one smoothed kind of layer."""
    folder = tmp_path_factory.mktemp("exports") / "good"
    plan = build_plan(model.groups(), CONFIGS["m4 timestep"], num_steps=SETTINGS.num_steps)
    quantize_(model.denoiser, plan, stats, model.clock)
    save_quantized(model.denoiser, plan, folder, model=model_info(model))
    restore_(model.denoiser)
    return folder


@pytest.fixture
def export(saved, tmp_path):
    """A copy of the good export, to be damaged."""
    return shutil.copytree(saved, tmp_path / "export")


def weights_of(folder):
    return next(folder.glob("*.safetensors"))


def description_of(folder):
    return next(folder.glob("quant_model_description_*.json"))


def rewrite(folder, change):
    """Change the tensors and make the manifest agree, as a faulty exporter would."""
    tensors = load_file(weights_of(folder))
    change(tensors)
    save_file(tensors, weights_of(folder))
    sign(folder)


def sign(folder):
    path = folder / "hyq_manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / name).chmod(0o640)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_loaded_renders_what_was_saved(model, quantized, tmp_path, name, layout):
    plan = quantized(CONFIGS[name])
    videos = model.render(PROMPTS, SEEDS, SETTINGS)
    save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model), layout=layout)
    fresh = TinyVideoModel(0)

    loaded_plan = load_quantized(fresh.denoiser, tmp_path / "export", fresh.clock)
    loaded_videos = fresh.render(PROMPTS, SEEDS, SETTINGS)

    assert loaded_plan == plan
    for loaded, video in zip(loaded_videos, videos, strict=True):
        assert torch.equal(loaded, video)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_good_export_has_no_problems_and_stays_close_to_the_float_model(model, quantized, tmp_path, name):
    plan = quantized(CONFIGS[name])
    save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model))
    restore_(model.denoiser)

    report = verify_export(tmp_path / "export", model)

    assert report.problems == ()
    assert report.ok
    assert report.layers == len(plan.quantized)
    assert {0, SETTINGS.num_steps - 1} <= {check.step_index for check in report.forward}
    assert all(check.cosine > 0.98 for check in report.forward)


def test_a_float16_export_holds_integer_scales_and_renders_the_same(model, quantized, tmp_path):
    """The operator takes the bits of a float32 in the low half of an int64 (npu_quant_matmul, float16 output)."""
    config = QuantConfig(linear=W8A8Static(), layers=SELECTION, deploy_dtype="float16")
    plan = quantized(config)
    videos = model.render(PROMPTS, SEEDS, SETTINGS)
    save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model))
    scales = load_file(weights_of(tmp_path / "export"))["double_blocks.0.img_attn_qkv.deq_scale"]
    fresh = TinyVideoModel(0)
    load_quantized(fresh.denoiser, tmp_path / "export", fresh.clock)

    assert scales.dtype == torch.int64
    assert bool((scales.numpy().astype("uint32").view("float32") > 0).all())
    assert verify_export(tmp_path / "export").ok
    assert all(map(torch.equal, fresh.render(PROMPTS, SEEDS, SETTINGS), videos))


def test_a_bfloat16_model_keeps_its_float_tensors_and_stores_scales_in_float32(tmp_path):
    model = TinyVideoModel(0, dtype=torch.bfloat16)
    plan = build_plan(model.groups(), CONFIGS["m4 timestep"], num_steps=SETTINGS.num_steps)
    records = capture_in_memory(model, PROMPTS, SEEDS, SETTINGS)
    quantize_(model.denoiser, plan, observe(model.denoiser, model.groups(), records, model.clock), model.clock)
    videos = model.render(PROMPTS, SEEDS, SETTINGS)
    save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model))
    tensors = load_file(weights_of(tmp_path / "export"))
    fresh = TinyVideoModel(0, dtype=torch.bfloat16)
    load_quantized(fresh.denoiser, tmp_path / "export", fresh.clock)

    assert tensors["final_layer.linear.weight"].dtype == torch.bfloat16
    assert tensors["double_blocks.0.img_attn_qkv.linear.bias"].dtype == torch.float32
    assert tensors["double_blocks.0.img_attn_qkv.linear.deq_scale"].dtype == torch.float32
    assert verify_export(tmp_path / "export", model).problems == ()
    assert all(map(torch.equal, fresh.render(PROMPTS, SEEDS, SETTINGS), videos))
    with pytest.raises(ExportError, match="in bfloat16"):
        load_quantized(TinyVideoModel(0).denoiser, tmp_path / "export", StepClock())


@pytest.mark.parametrize("name", ["static", "timestep", "m4 dynamic"])
def test_scales_that_the_engine_rounds_are_stored_rounded(model, quantized, tmp_path, name):
    """The engine casts these three to bfloat16 but keeps deq_scale: unrounded ones would give a gain error."""
    plan = quantized(CONFIGS[name])
    save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model))
    tensors = load_file(weights_of(tmp_path / "export"))
    rounded = [key for key in tensors if key.endswith(("input_scale", "weight_scale", "mul_scale"))]

    assert rounded
    assert all(torch.equal(tensors[key], tensors[key].bfloat16().float()) for key in rounded)


def test_files_have_the_names_and_modes_that_the_engine_wants(saved):
    """The engine (mindiesd) refuses files that others may read, and derives the weight file's name from the type."""
    names = {path.name: stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}

    assert names == {
        "quant_model_weight_w8a8_timestep.safetensors": 0o640,
        "quant_model_description_w8a8_timestep.json": 0o640,
        "hyq_manifest.json": 0o640,
    }
    assert stat.S_IMODE(saved.stat().st_mode) == 0o750


def test_the_description_names_the_algorithm_of_every_tensor(saved):
    description = json.loads(description_of(saved).read_text())
    tensors = load_file(weights_of(saved))

    assert description.pop("model_quant_type") == "W8A8_TIMESTEP"
    assert description.keys() == tensors.keys()
    assert description["double_blocks.0.img_attn_qkv.linear.weight"] == "W8A8_TIMESTEP"
    assert description["double_blocks.0.img_attn_qkv.div.mul_scale"] == "FLOAT"
    assert description["double_blocks.0.img_attn_qkv.linear.bias"] == "FLOAT"
    assert description["double_blocks.0.img_attn_proj.bias"] == "FLOAT"
    assert description["double_blocks.0.img_attn_proj.weight"] == "W8A8_TIMESTEP"
    assert description["double_blocks.0.img_mod.linear.weight"] == "FLOAT"
    assert description["final_layer.linear.weight"] == "FLOAT"
    assert set(description.values()) == {"FLOAT", "W8A8_TIMESTEP"}


def test_tensors_have_the_shapes_and_dtypes_of_the_contract(saved):
    """Hidden width 32, four steps: qkv is [96, 32], linear1 [224, 32] (q, k, v and the fourfold MLP)."""
    tensors = load_file(weights_of(saved))
    found = {
        key.removeprefix("single_blocks.1.linear1."): (tuple(tensor.shape), tensor.dtype)
        for key, tensor in tensors.items()
        if key.startswith("single_blocks.1.linear1.")
    }

    assert found == {
        "div.mul_scale": ((32,), torch.float32),
        "linear.weight": ((224, 32), torch.int8),
        "linear.weight_scale": ((224, 1), torch.float32),
        "linear.weight_offset": ((224, 1), torch.float32),
        "linear.bias": ((224,), torch.float32),
        "linear.input_scale": ((4, 1), torch.float32),
        "linear.input_offset": ((4, 1), torch.float32),
        "linear.deq_scale": ((4, 224), torch.float32),
        "linear.quant_bias": ((4, 224), torch.int32),
    }
    assert tensors["double_blocks.0.img_attn_qkv.linear.weight"].shape == (96, 32)


def test_stored_tensors_compute_the_float_layer(model, saved):
    """Independent of our modules: dequantize a smoothed fused layer by hand and compare it with the float weights."""
    tensors = load_file(weights_of(saved))
    layer = "double_blocks.1.txt_attn_qkv"
    attention = model.denoiser.transformer_blocks[1].attn
    float_weight = torch.cat([attention.add_q_proj.weight, attention.add_k_proj.weight, attention.add_v_proj.weight])

    scale = tensors[f"{layer}.linear.weight_scale"]
    restored = tensors[f"{layer}.linear.weight"].float() * scale * tensors[f"{layer}.div.mul_scale"]
    half_a_step = 0.5 * scale * tensors[f"{layer}.div.mul_scale"]

    assert bool(((restored - float_weight).abs() <= half_a_step * 1.02).all())  # 2 %: scales are rounded to bfloat16


def test_float_tensors_are_all_there_and_unchanged(model, saved):
    tensors = load_file(weights_of(saved))
    state = model.denoiser.state_dict()
    scale, shift = tensors["final_layer.adaLN_modulation.1.weight"].chunk(2)[::-1]

    assert torch.equal(tensors["img_in.proj.weight"], state["x_embedder.proj.weight"])
    assert torch.equal(torch.cat([scale, shift]), state["norm_out.linear.weight"])
    assert torch.equal(
        tensors["double_blocks.0.img_attn_q_norm.weight"], state["transformer_blocks.0.attn.norm_q.weight"]
    )


def test_the_manifest_says_what_the_folder_is(model, saved):
    manifest = read_manifest(saved)

    assert manifest.config == CONFIGS["m4 timestep"]
    assert manifest.model == model_info(model)
    assert manifest.static_steps == (2, 4)
    assert manifest.layer_counts["w8a8_timestep"] == len(manifest.plan.quantized)
    assert manifest.layer_counts["float"] + len(manifest.plan.quantized) == len(model.groups())
    assert manifest.layer_counts["smoothed"] == 10  # per double block 2 qkv and 2 fc1, per single block linear1
    assert str(saved.parent) not in (saved / "hyq_manifest.json").read_text()


def set_mode(folder):
    weights_of(folder).chmod(0o644)


def make_link(folder):
    path = description_of(folder)
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")


def change_byte(folder):
    data = bytearray(weights_of(folder).read_bytes())
    data[-1] ^= 1
    weights_of(folder).write_bytes(data)


def cut(folder):
    weights_of(folder).write_bytes(weights_of(folder).read_bytes()[:-100])


def drop_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop("single_blocks.0.linear2.deq_scale"))


def spoil_scale(folder):
    rewrite(folder, lambda tensors: tensors["single_blocks.0.linear2.input_scale"].zero_())


def spoil_float(folder):
    rewrite(folder, lambda tensors: tensors["txt_in.input_embedder.bias"].fill_(float("nan")))


def change_dtype(folder):
    def to_float(tensors):
        tensors["single_blocks.0.linear2.weight"] = tensors["single_blocks.0.linear2.weight"].float()

    rewrite(folder, to_float)


def change_shape(folder):
    def scalar(tensors):
        tensors["single_blocks.0.linear2.input_offset"] = tensors["single_blocks.0.linear2.input_offset"][0]

    rewrite(folder, scalar)


def call_it_float(folder):
    path = description_of(folder)
    path.write_text(
        path.read_text().replace(
            'single_blocks.0.linear2.weight": "W8A8_TIMESTEP', 'single_blocks.0.linear2.weight": "FLOAT'
        )
    )
    sign(folder)


def forget_type(folder):
    description = json.loads(description_of(folder).read_text())
    del description["model_quant_type"]
    description_of(folder).write_text(json.dumps(description))
    sign(folder)


DAMAGES = {
    "readable by others": (set_mode, r"mode within 0640, but it has 0644"),
    "a link": (make_link, r"description.* regular file, but it is a link"),
    "a changed byte": (change_byte, r"SHA-256 of the manifest, but its bytes were changed"),
    "cut short": (cut, r"must have \d+ bytes, but it has \d+"),
    "no weight file": (lambda folder: weights_of(folder).unlink(), r"regular file, but it is missing"),
    "a missing tensor": (drop_tensor, r"single_blocks.0.linear2.deq_scale of layer .* but is missing"),
    "a scale of zero": (spoil_scale, r"linear2.input_scale must be positive"),
    "a float tensor of nan": (spoil_float, r"txt_in.input_embedder.bias must be finite"),
    "a wrong dtype": (change_dtype, r"linear2.weight must be torch.int8, but is torch.float32"),
    "a wrong shape": (change_shape, r"linear2.input_offset must have shape \(4, 1\), but has \(1,\)"),
    "a layer called float": (
        call_it_float,
        r"must say W8A8_TIMESTEP for single_blocks.0.linear2.weight, but says FLOAT",
    ),
    "no type": (forget_type, r"must describe model_quant_type"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_names_what_is_wrong(model, export, name):
    damage, expected = DAMAGES[name]
    damage(export)

    report = verify_export(export, model)

    assert not report.ok
    assert any(re.search(expected, problem) for problem in report.problems), report.problems


@pytest.mark.parametrize("name", ["a changed byte", "cut short", "no weight file", "a missing tensor"])
def test_a_damaged_export_is_not_loaded_and_leaves_the_denoiser_alone(export, name):
    DAMAGES[name][0](export)
    fresh = TinyVideoModel(0)
    before = fresh.render(PROMPTS[:1], SEEDS[:1], SETTINGS)[0]

    with pytest.raises(ExportError):
        load_quantized(fresh.denoiser, export, fresh.clock)

    assert torch.equal(fresh.render(PROMPTS[:1], SEEDS[:1], SETTINGS)[0], before)


def test_another_models_export_is_refused(saved):
    other = TinyVideoModel(1)

    with pytest.raises(ExportError, match=r"made from tiny 0 in float32 .* load the same weights"):
        load_quantized(other.denoiser, saved, other.clock)

    report = verify_export(saved, other)

    assert not report.ok
    assert "load the model it was made from" in report.problems[0]


def test_an_export_whose_layers_are_wrong_fails_the_forward_check(model, export):
    """Everything is well-formed, but the weights were negated: only running it tells."""
    rewrite(export, negate_weights)

    report = verify_export(export, model)

    assert not report.ok
    assert any("cosine" in problem or "gain" in problem for problem in report.problems)


def negate_weights(tensors):
    for key, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            tensor.neg_()
        elif key.endswith("quant_bias"):
            tensor.zero_()


def test_verify_leaves_the_model_in_float(model, saved):
    before = model.render(PROMPTS[:1], SEEDS[:1], SETTINGS)[0]
    verify_export(saved, model)

    assert torch.equal(model.render(PROMPTS[:1], SEEDS[:1], SETTINGS)[0], before)


def test_what_is_no_export_is_an_error(tmp_path):
    for call in (verify_export, read_manifest, lambda folder: load_quantized(torch.nn.Identity(), folder, StepClock())):
        with pytest.raises(ExportError, match="is none; give what `export` wrote"):
            call(tmp_path)


def test_a_damaged_manifest_is_a_problem_not_an_exception(export):
    (export / "hyq_manifest.json").write_text('{"format_version": 1}')

    report = verify_export(export)

    assert not report.ok
    assert "must be a manifest of format 2" in report.problems[0]


def test_an_existing_export_is_replaced_only_when_told(model, quantized, export):
    plan = quantized(CONFIGS["dynamic"])
    with pytest.raises(ExportError, match="holds an export already"):
        save_quantized(model.denoiser, plan, export, model=model_info(model))
    untouched = read_manifest(export).model_quant_type
    save_quantized(model.denoiser, plan, export, model=model_info(model), overwrite=True)

    assert untouched == "W8A8_TIMESTEP"
    assert sorted(path.name for path in export.iterdir()) == [
        "hyq_manifest.json",
        "quant_model_description_w8a8_dynamic.json",
        "quant_model_weight_w8a8_dynamic.safetensors",
    ]
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_a_folder_of_other_things_is_never_replaced(model, quantized, tmp_path):
    plan = quantized(CONFIGS["dynamic"])
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ExportError, match="holds other things"):
        save_quantized(model.denoiser, plan, tmp_path, model=model_info(model), overwrite=True)

    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_denoiser_that_another_plan_quantized_is_not_saved(model, quantized, tmp_path):
    quantized(CONFIGS["dynamic"])
    other = build_plan(model.groups(), QuantConfig(linear=W8A8Dynamic()), num_steps=SETTINGS.num_steps)
    with pytest.raises(ExportError, match="quantize it with this plan first"):
        save_quantized(model.denoiser, other, tmp_path / "export", model=model_info(model))

    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_quantizes_nothing_is_not_saved(model, tmp_path):
    plan = build_plan(model.groups(), QuantConfig(linear=None), num_steps=SETTINGS.num_steps)

    with pytest.raises(ExportError, match="quantizes none; ship the float weights"):
        save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model))


def test_a_layout_that_the_target_would_ignore_is_refused(model, quantized, tmp_path):
    """MindIE-SD leaves layers whose names it does not find in float, without a message."""
    plan = quantized(CONFIGS["dynamic"])

    with pytest.raises(ExportError, match="use layout original"):
        save_quantized(
            model.denoiser,
            plan,
            tmp_path / "export",
            model=model_info(model),
            layout="diffusers",
            target="mindie-sd-3.1/910b",
        )
