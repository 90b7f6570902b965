"""What `verify_export` says beyond damage: what a target ignores, layers one by one, and exports of msModelSlim's."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.calibration.capture import capture_in_memory
from hyquant.config import (
    M4,
    W4A16,
    W8A16,
    FA3Fp8,
    FA3Int8,
    LayerSelection,
    QuantConfig,
    W8A8Dynamic,
    W8A8Static,
    W8A8Timestep,
)
from hyquant.errors import ExportError
from hyquant.export import mindie, model_info, save_quantized, verify_export
from hyquant.export.compare import rounded
from hyquant.export.mindie import load_in_engine
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import RenderSettings
from hyquant.models.tiny import TinyVideoModel
from hyquant.plan import build_plan
from hyquant.quantize import restore_

SETTINGS = RenderSettings(height=64, width=64, num_frames=5, num_steps=4)
SELECTION = LayerSelection(exclude=("*img_mod*", "*modulation*"))
PROMPT = "a red square moving left on a black background"
CONFIGS = {
    "dynamic": QuantConfig(linear=W8A8Dynamic(), layers=SELECTION),
    "static": QuantConfig(linear=W8A8Static(), layers=SELECTION),
    "timestep": QuantConfig(linear=W8A8Timestep(timestep_sep=2), layers=SELECTION),
    "w8a16": QuantConfig(linear=W8A16(), layers=SELECTION),
    "m4": QuantConfig(linear=W8A8Dynamic(), smoothing=M4(), layers=SELECTION),
    "fp8": QuantConfig(linear=W8A8Dynamic(), attention=FA3Fp8(), layers=SELECTION),
    "fa3": QuantConfig(linear=W8A8Dynamic(), attention=FA3Int8(), layers=SELECTION),
}


@pytest.fixture(scope="module")
def model():
    return TinyVideoModel(0)


@pytest.fixture(scope="module")
def exports(model, tmp_path_factory):
    """Every configuration exported from statistics of the very calls that verify makes.

    Those are rounded to bfloat16: guidance 6.0 * 1000 becomes 6016, which a range of unrounded calls would clamp.
    """
    folder = tmp_path_factory.mktemp("exports")
    records = [rounded(record, "bfloat16") for record in capture_in_memory(model, [PROMPT], [0], SETTINGS)]
    for name, config in CONFIGS.items():
        blocks = attention_blocks(model.denoiser)
        plan = build_plan(model.groups(), config, num_steps=SETTINGS.num_steps, attentions=blocks)
        found = calibrate(model.denoiser, plan, records, model.clock)
        quantize_calibrated_(model.denoiser, plan, found, model.clock)
        save_quantized(model.denoiser, plan, folder / name, model=model_info(model))
        restore_(model.denoiser)
    return folder


@pytest.fixture
def foreign(exports, tmp_path):
    """Give an export the form of msModelSlim 26.1.0's: no manifest, scales in bfloat16, its file modes."""

    def made(name):
        folder = shutil.copytree(exports / name, tmp_path / name)
        (folder / "hyq_manifest.json").unlink()
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        for key, tensor in tensors.items():
            if key.endswith(("input_scale", "input_offset", "weight_scale", "weight_offset", "mul_scale")):
                tensors[key] = tensor.bfloat16()
        path.unlink()
        save_file(tensors, path)
        path.chmod(0o400)
        next(folder.glob("*.json")).chmod(0o600)
        return folder

    return made


def change(folder, edit):
    """Edit the tensors of a folder without a manifest."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    edit(tensors)
    path.unlink()
    save_file(tensors, path)
    path.chmod(0o400)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_of_a_good_export_does_what_the_float_layer_does(model, exports, name):
    report = verify_export(exports / name, model)

    assert report.problems == ()
    assert report.replaced == report.layers
    assert {check.name for check in report.layer_checks} <= {group.name for group in model.groups()}
    assert len({check.name for check in report.layer_checks}) == report.layers
    assert all(abs(check.gain - 1) < 0.02 for check in report.layer_checks)
    assert all(check.cosine > 0.999 for check in report.layer_checks)


def test_a_layer_with_a_wrong_gain_is_named(model, exports, tmp_path):
    """A doubled scale in one layer of many: the whole call may hide it, the layer cannot."""
    folder = shutil.copytree(exports / "dynamic", tmp_path / "x")
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["single_blocks.0.linear2.weight_scale"] *= 2
    save_file(tensors, path)
    path.chmod(0o640)
    sign(folder)

    problems = verify_export(folder, model).problems

    assert any(problem.startswith("layer single_blocks.0.linear2 must do what the float") for problem in problems)


def sign(folder):
    import hashlib

    manifest = json.loads((folder / "hyq_manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "hyq_manifest.json").write_text(json.dumps(manifest))


def test_attention_that_a_target_ignores_is_told_apart_from_problems(model, exports):
    report = verify_export(exports / "fa3", model, target="mindie-sd-3.1/910b")

    assert report.ok
    assert report.target == "mindie-sd-3.1/910b"
    assert report.replaced == report.layers
    assert {entry.name for entry in report.ignored} == {
        "double_blocks.0",
        "double_blocks.1",
        "single_blocks.0",
        "single_blocks.1",
    }
    assert all("does not execute FAQuant" in entry.reason for entry in report.ignored)
    assert verify_export(exports / "fa3", target="mindie-sd-3.1/910b").ignored == report.ignored
    assert verify_export(exports / "fa3", model).ignored == ()


@pytest.mark.parametrize(
    ("config", "target", "sentence"),
    [
        (CONFIGS["dynamic"].model_copy(update={"deploy_dtype": "float32"}), "mindie-sd-3.1/910b", "float32"),
        (QuantConfig(linear=W4A16(group_size=32), layers=SELECTION), "mindie-sd-2.3/910b", "group_size is 32"),
    ],
    ids=["dtype", "groups"],
)
def test_what_a_target_would_read_otherwise_is_a_problem(model, tmp_path, config, target, sentence):
    """Such an export is not made for the target; one of an older version, or one for this library, may be asked of."""
    plan = build_plan(model.groups(), config, num_steps=4)
    quantize_calibrated_(model.denoiser, plan, calibrate(model.denoiser, plan, [], model.clock), model.clock)
    manifest = save_quantized(model.denoiser, plan, tmp_path / "x", model=model_info(model))
    restore_(model.denoiser)

    assert verify_export(tmp_path / "x", model).ok
    report = verify_export(tmp_path / "x", model, target=target)

    assert len(report.problems) == 1
    assert sentence in report.problems[0]
    assert report.replaced == report.layers
    assert (manifest.loader is None) == (config.deploy_dtype == "float32")


def test_an_export_in_diffusers_names_is_all_float_to_mindie(model, tmp_path):
    plan = build_plan(model.groups(), CONFIGS["dynamic"], num_steps=4)
    quantize_calibrated_(model.denoiser, plan, calibrate(model.denoiser, plan, [], model.clock), model.clock)
    save_quantized(model.denoiser, plan, tmp_path / "x", model=model_info(model), layout="diffusers")
    restore_(model.denoiser)

    for given in (model, None):
        report = verify_export(tmp_path / "x", given, target="mindie-sd-3.1/910b")

        assert report.replaced == 0
        assert len(report.ignored) == sum(len(layer.modules) for layer in plan.quantized)
    assert verify_export(tmp_path / "x", model).replaced == len(report.ignored)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_good_export_of_msmodelslims_form_has_no_problems(model, foreign, name):
    folder = foreign(name)
    report = verify_export(folder, model)

    assert report.problems == ()
    assert report.replaced > 0
    assert report.layer_checks
    assert all(check.cosine > 0.999 for check in report.layer_checks)
    assert verify_export(folder).problems == ()


def rename_layers(folder):
    def renamed(tensors):
        for key in [key for key in tensors if key.startswith("double_blocks.0.img_attn_qkv")]:
            tensors[key.replace("img_attn_qkv", "img_attn_qvk")] = tensors.pop(key)

    change(folder, renamed)
    path = next(folder.glob("*.json"))
    path.write_text(path.read_text().replace("double_blocks.0.img_attn_qkv", "double_blocks.0.img_attn_qvk"))


def test_a_renamed_layer_is_listed_as_ignored(model, foreign):
    folder = foreign("dynamic")
    rename_layers(folder)
    report = verify_export(folder, model, target="mindie-sd-3.1/910b")

    assert [(entry.name, entry.reason) for entry in report.ignored] == [
        ("double_blocks.0.img_attn_qvk", "the model has no module of that name")
    ]


def edits(**changes):
    """Return a damage that applies functions to the tensors whose names end so."""

    def damage(folder):
        def edit(tensors):
            for suffix, function in changes.items():
                key = next(key for key in tensors if key.endswith(suffix.replace("__", ".")))
                tensors[key] = function(tensors[key])

        change(folder, edit)

    return damage


def drop(suffix):
    def damage(folder):
        change(folder, lambda tensors: tensors.pop(next(key for key in tensors if key.endswith(suffix))))

    return damage


def say(old, new):
    def damage(folder):
        path = next(folder.glob("*.json"))
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return damage


def link(folder):
    path = next(folder.glob("*.json"))
    path.rename(folder.parent / "elsewhere.json")
    path.symlink_to(folder.parent / "elsewhere.json")


FOREIGN_DAMAGES = {
    "cut short": (lambda folder: cut(next(folder.glob("*.safetensors"))), "must be a safetensors file"),
    "readable by others": (lambda folder: next(folder.glob("*.safetensors")).chmod(0o644), "mode within 0640"),
    "a link": (link, "must be a regular file, but it is a link"),
    "no tensors": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "but it is missing"),
    "no JSON": (lambda folder: next(folder.glob("*.json")).write_text("{"), "must be JSON"),
    "a list": (lambda folder: next(folder.glob("*.json")).write_text("[]"), "must be a flat table"),
    "an unknown type": (say('model_quant_type": "W8A8_TIMESTEP', 'model_quant_type": "W8A8_X'), "engine's algorithms"),
    "an unknown scheme": (
        say('linear1.weight": "W8A8_TIMESTEP', 'linear1.weight": "W8A8_MIX'),
        "must name an algorithm",
    ),
    "an entry too many": (say('"model_quant', '"x.weight": "FLOAT", "model_quant'), "but there is no such tensor"),
    "a tensor undescribed": (say("double_blocks.0.img_attn_qkv.bias", "double_blocks.0.x.bias"), "must describe"),
    "no table": (drop("linear1.deq_scale"), "linear1.deq_scale of a W8A8_TIMESTEP layer must be there"),
    "no weight scale": (drop("linear1.weight_scale"), "linear1.weight_scale of a W8A8_TIMESTEP layer must be there"),
    "a float weight": (edits(linear1__weight=torch.Tensor.float), "must be torch.int8"),
    "a wrong shape": (edits(linear1__quant_bias=lambda t: t[:, :-1].contiguous()), "must have shape"),
    "a scale of zero": (edits(linear1__input_scale=torch.zeros_like), "must be positive"),
    "a negative scale": (edits(linear1__weight_scale=torch.Tensor.neg), "must be positive"),
    "a scale of nan": (edits(linear1__weight_scale=lambda t: t * float("nan")), "must be finite"),
    "a broken offset": (edits(linear1__input_offset=lambda t: t + 0.5), "must hold integers in"),
    "an offset out of range": (edits(linear1__input_offset=lambda t: t + 300), "must hold integers in"),
    "an asymmetric weight": (edits(linear1__weight_offset=torch.ones_like), "must be zero"),
    "another deq_scale": (edits(linear1__deq_scale=lambda t: t * 1.05), "must be input_scale times weight_scale"),
    "a nan in float": (edits(img_in__proj__bias=lambda t: t * float("nan")), "must be finite"),
    "weights of another model": (
        edits(linear1__weight=lambda t: torch.randint_like(t, -127, 128)),
        "it belongs to another model",
    ),
    "swapped rows": (edits(linear1__weight=lambda t: t.flip(0)), "belongs to another model or its scales are wrong"),
    "another width": (
        edits(linear2__weight=lambda t: t[:, :-8].contiguous()),
        "must have the model's shape",
    ),
}


def cut(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-100])
    path.chmod(0o400)


@pytest.mark.parametrize("name", FOREIGN_DAMAGES)
def test_what_is_wrong_with_msmodelslims_export_is_named(model, foreign, name):
    damage, expected = FOREIGN_DAMAGES[name]
    folder = foreign("timestep")
    damage(folder)
    torch.manual_seed(0)
    problems = verify_export(folder, model).problems

    assert any(expected in problem for problem in problems), problems


def test_scales_per_token_are_refused_where_int8_attention_is_executed(model, foreign):
    """What msModelSlim writes for HunyuanVideo: a row per token instead of one per head."""
    folder = foreign("fa3")

    def per_token(tensors):
        for part in "qkv":
            tensors[f"double_blocks.0.fa_{part}.scale"] = torch.ones(20, 1)
            tensors[f"double_blocks.0.fa_{part}.offset"] = torch.zeros(20, 1, dtype=torch.int8)

    change(folder, per_token)

    assert any(
        "one per token" in problem for problem in verify_export(folder, model, target="mindie-sd-2.3/910b").problems
    )
    assert verify_export(folder, model, target="mindie-sd-3.1/910b").problems == ()


@pytest.mark.parametrize("missing", ["q_rot", "k_rot"])
def test_float8_attention_without_a_rotation_is_refused_where_it_is_executed(model, foreign, missing):
    folder = foreign("fp8")
    change(folder, lambda tensors: tensors.pop(f"double_blocks.0.{missing}"))
    say(f'"double_blocks.0.{missing}": "FLOAT",', "")(folder)

    report = verify_export(folder, model, target="mindie-sd-3.1/950")
    assert report.problems == (f"double_blocks.0.{missing} of a FP8_DYNAMIC attention must be there, but is missing",)
    assert verify_export(folder, model, target="mindie-sd-3.1/910b").problems == ()


class FakeEngine(types.ModuleType):
    """Has the engine's functions, and replaces Linears by the rules that `engine_view` writes down."""

    def __init__(self, forget=()):
        super().__init__("mindiesd")
        self.forget = forget
        self.policy = None
        outer = self

        class TimestepPolicyConfig:
            def register(self, steps, strategy, target):
                outer.policy = (steps, strategy, target)

        class TimestepManager:
            @staticmethod
            def set_timestep_idx(index):
                outer.step = index

        self.TimestepPolicyConfig, self.TimestepManager = TimestepPolicyConfig, TimestepManager

    def quantize(self, model, path, *, dtype, timestep_config=None):
        description = json.loads(Path(path).read_text())
        tensors = load_file(path.replace("description", "weight").replace(".json", ".safetensors"))
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and f"{name}.weight" in description and name not in self.forget:
                if description[f"{name}.weight"] == "FLOAT":
                    continue
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, Dequantized(tensors, name))
        return model


class Dequantized(nn.Module):
    """The float layer that int8 rows stand for."""

    def __init__(self, tensors, name):
        super().__init__()
        self.w = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
        self.b = tensors[f"{name}.bias"]

    def forward(self, x):
        return nn.functional.linear(x.float(), self.w, self.b)


def test_the_engine_is_counted_and_run(model, exports, monkeypatch):
    engine = FakeEngine()
    monkeypatch.setitem(sys.modules, "mindiesd", engine)
    monkeypatch.setattr(mindie, "ENGINE_DEVICE", "cpu")
    record = capture_in_memory(model, [PROMPT], [0], SETTINGS)[-1]
    report = load_in_engine(exports / "timestep", model.denoiser, record)

    assert report.problems == ()
    assert report.replaced == {"Dequantized": report.expected}
    assert len(report.layer_checks) == report.expected
    assert all(check.cosine > 0.9999 for check in report.layer_checks)
    assert engine.policy == (range(2, 4), "static", "w8a8_static_linear")
    assert engine.step == 3


def test_layers_that_the_engine_forgets_are_a_problem(model, exports, monkeypatch):
    monkeypatch.setitem(sys.modules, "mindiesd", FakeEngine(forget=("single_blocks.0.linear1",)))
    report = load_in_engine(exports / "dynamic", model.denoiser)

    assert "left single_blocks.0.linear1 in float" in report.problems[0]
    assert "the float model is on cpu" in report.not_run


def test_an_engine_that_refuses_is_quoted(model, exports, monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr(engine, "quantize", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setitem(sys.modules, "mindiesd", engine)

    assert "but it says: division by zero" in load_in_engine(exports / "dynamic", model.denoiser).problems[0]


def test_without_the_engine_there_is_a_clear_sentence(model, exports, monkeypatch):
    monkeypatch.setitem(sys.modules, "mindiesd", None)
    with pytest.raises(ExportError, match="where mindiesd can be imported, but here it cannot"):
        load_in_engine(exports / "dynamic", model.denoiser)
