"""Exports that are wrong on purpose: each is refused by the loader, or misses a bar, so the bars can fail."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyquant.config import M4, W4A8, LayerSelection, QuantConfig, W4A4Dynamic, W8A8Dynamic
from tests.reference.files import ConfigError, ParametersInvalid
from tests.reference.loader import load
from tests.reference.operators import RefusedByOperator
from tests.reference_tests.configs import CONFIGS
from tests.reference_tests.judging import deploy, judge
from tests.reference_tests.routes import description_of, loaded_by_hyquant, weights_of, write_export

TABLES = ("input_scale", "input_offset", "deq_scale", "quant_bias")
LAYER = "double_blocks.0.img_attn_qkv"


@pytest.fixture
def altered(export_of, tmp_path):
    """Copy an export of the original layout and change its tensors and its description."""

    def alter(name, change_tensor=lambda key, tensor: tensor, rename=lambda key: key):
        folder = shutil.copytree(export_of("original", name), tmp_path / "wrong")
        weights, description = weights_of(folder), description_of(folder)
        tensors = load_file(weights)
        save_file({rename(key): change_tensor(key, tensor).contiguous() for key, tensor in tensors.items()}, weights)
        described = json.loads(description.read_text())
        description.write_text(json.dumps({rename(key): value for key, value in described.items()}))
        for path in (weights, description):
            path.chmod(0o640)
        return folder

    return alter


@pytest.fixture
def missed(route_of, float_run_of):
    """Return the bars that a folder misses in the original layout."""

    def judged(folder, lowest_cosine):
        scores, _, _ = judge(route_of("original", "bfloat16"), folder, float_run_of("original", "bfloat16"))
        return scores.missed(lowest_cosine)

    return judged


def times(factor, kind, layer=""):
    """Multiply tensors of one kind, of all layers or of one."""
    return lambda key, tensor: tensor * factor if key.endswith(kind) and layer in key else tensor


def swap_q_and_k(key, tensor):
    if LAYER not in key or not key.endswith((".weight", ".weight_scale", ".bias")):
        return tensor
    q, k, v = tensor.chunk(3)
    return torch.cat([k, q, v])


def shift_tables(rows, kinds=TABLES):
    return lambda key, tensor: tensor.roll(rows, dims=0) if key.endswith(kinds) else tensor


def invert_multiplier(key, tensor):
    return 1 / tensor if key.endswith("mul_scale") else tensor


DAMAGES = {
    "every dynamic scale 3 % off": ("dynamic", times(1.03, "weight_scale"), {"gain", "cosine"}),
    "one dynamic scale 3 % off": ("dynamic", times(0.97, "weight_scale", LAYER), {"gain"}),
    "every static scale 3 % off": ("static", times(1.03, "deq_scale"), {"gain"}),
    "swapped q and k rows": ("dynamic", swap_q_and_k, {"gain", "cosine"}),
    "tables one step late": ("timestep all static", shift_tables(1), {"gain"}),
    "tables one step early": ("timestep all static", shift_tables(-1), {"gain"}),
    "input scales one step late": ("timestep all static", shift_tables(1, ("input_scale",)), {"gain", "cosine"}),
    "inverted multiplier": ("m4 dynamic", invert_multiplier, {"gain", "cosine"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_export_misses_the_bars(altered, missed, damage):
    name, change, expected = DAMAGES[damage]

    assert missed(altered(name, change), CONFIGS[name][1]) >= expected


def test_layers_under_another_name_are_missing_in_the_count(altered, missed):
    folder = altered("dynamic", rename=lambda key: key.replace("double_blocks.0.img_attn_qkv", "double_blocks.0.qkv"))

    assert missed(folder, 0.9997) == {"count"}


def test_an_export_in_the_names_of_another_layout_loads_without_a_word_and_replaces_nothing(
    export_of, route_of, float_run_of
):
    route, expected = route_of("converted", "bfloat16"), float_run_of("converted", "bfloat16")

    scores, loaded, latents = judge(route, export_of("diffusers", "dynamic"), expected)

    assert loaded.linears == {}
    assert scores.missed(0.9997) == {"count"}
    assert torch.equal(latents, expected.latents)


def test_smoothing_that_is_folded_into_float_weights_is_lost(route_of, float_run_of, tmp_path):
    """The engine never reads FLOAT tensors, so the layer before keeps its old weights."""
    route = route_of("original", "bfloat16")
    config = QuantConfig(linear=W8A8Dynamic(), smoothing=M4(placement="fold"))

    folder = write_export(route, config, tmp_path / "export")
    scores, _, _ = judge(route, folder, float_run_of("original", "bfloat16"))

    assert "gain" in scores.missed(0.9997)


def test_the_engine_adds_no_bias_to_layers_of_4_bits(route_of, float_run_of, tmp_path):
    """It is why exports of such layers for an engine are refused: all else is as hyquant computes it."""
    route, layer = route_of("original", "bfloat16"), "double_blocks.0.img_mlp.fc1"
    config = QuantConfig(linear=W4A4Dynamic(), layers=LayerSelection(include=(layer,)))
    folder = write_export(route, config, tmp_path / "export")
    loaded, _ = deploy(route, folder)
    (_, x), *_ = float_run_of("original", "bfloat16").linears[layer]

    with torch.no_grad(), loaded_by_hyquant(route, folder) as ours:
        engine, simulated = loaded.model.get_submodule(layer)(x), ours.get_submodule(layer)(x)
    bias = route.deployed.get_submodule(layer).bias

    assert loaded.linears == {layer: "W4A4_DYNAMIC"}
    assert bias.abs().max() > 0.01
    assert (engine + bias - simulated).abs().max() <= 2**-8 * engine.abs().max()


def test_the_engine_leaves_layers_of_4_and_8_bits_in_float_without_a_word(route_of, float_run_of, tmp_path):
    route = route_of("original", "bfloat16")

    loaded, latents = deploy(route, write_export(route, QuantConfig(linear=W4A8()), tmp_path / "export"))

    assert loaded.linears == {}
    assert torch.equal(latents, float_run_of("original", "bfloat16").latents)


@pytest.mark.parametrize("name", ["w8a16", "w4a16"])
def test_the_engine_does_not_multiply_the_input_of_weight_only_layers(route_of, float_run_of, tmp_path, name):
    route = route_of("original", "bfloat16")
    config = CONFIGS[name][0].model_copy(update={"smoothing": M4()})

    scores, _, _ = judge(route, write_export(route, config, tmp_path / "export"), float_run_of("original", "bfloat16"))

    assert scores.missed(0.99, largest_gain_error=0.1) == {"cosine", "gain"}


@pytest.mark.parametrize("name", ["static", "m4 static", "dynamic"])
def test_scales_that_were_not_rounded_first_change_in_the_engine(route_of, float_run_of, tmp_path, name):
    """Weights and deq_scale were made with other values than the engine then computes with, and the gains show it."""
    route, expected = route_of("original", "bfloat16"), float_run_of("original", "bfloat16")
    errors = {}
    for dtype in ("bfloat16", "float32"):
        config = CONFIGS[name][0].model_copy(update={"deploy_dtype": dtype})
        scores, loaded, _ = judge(route, write_export(route, config, tmp_path / dtype), expected)
        errors[dtype] = sum(abs(gain - 1) for gain in scores.gains.values()) / len(scores.gains)
        assert bool(loaded.changed_by_casts) == (dtype == "float32")

    assert errors["float32"] > 1.25 * errors["bfloat16"]


def test_a_scale_without_dimensions_loads_and_fails_at_the_first_forward(altered, route_of):
    folder = altered("static", lambda key, tensor: tensor.reshape(()) if key.endswith("input_scale") else tensor)

    with pytest.raises(RefusedByOperator, match=r"npu_quantize takes 1-D scales, but got \(\)"):
        deploy(route_of("original", "bfloat16"), folder)


@pytest.mark.parametrize("name", ["float16 static", "float16 timestep"])
def test_integer_scales_are_for_float16_only(export_of, route_of, name):
    with pytest.raises(RefusedByOperator, match=r"npu_quant_matmul takes a scale in .* bfloat16, but got int64"):
        deploy(route_of("original", "bfloat16"), export_of("original", name))


def test_transposed_weights_are_refused_by_the_operator(altered, route_of):
    folder = altered("dynamic", lambda key, tensor: tensor.T if key.endswith("fc1.weight") else tensor)

    with pytest.raises(RefusedByOperator, match="equal k"):
        deploy(route_of("original", "bfloat16"), folder)


def test_a_missing_tensor_is_named(altered, route_of):
    folder = altered("static", rename=lambda key: key.replace("img_attn_qkv.quant_bias", "img_attn_qkv.int_bias"))

    with pytest.raises(ParametersInvalid, match=r"parameter missing: double_blocks.0.img_attn_qkv.quant_bias"):
        deploy(route_of("original", "bfloat16"), folder)


def test_float8_attention_without_a_rotation_is_refused(altered, route_of):
    """Even one that would rotate nothing: the engine takes its rotations for critical."""
    folder = altered("unrotated fp8 attention, dynamic", rename=lambda key: key.replace("k_rot", "k_turn"))

    with pytest.raises(ParametersInvalid, match=r"parameter missing: double_blocks.0.k_rot"):
        deploy(route_of("original", "bfloat16"), folder)


def let_others_read(folder):
    weights_of(folder).chmod(0o644)


def link_description(folder):
    path = description_of(folder)
    path.rename(folder / "real.json")
    path.symlink_to(folder / "real.json")


def say_lower_case(folder):
    path = description_of(folder)
    path.write_text(path.read_text().replace('"model_quant_type": "W8A8"', '"model_quant_type": "w8a8"'))


REFUSALS = {
    "weights that others may read": (let_others_read, PermissionError, "mode 0644"),
    "a link": (link_description, ParametersInvalid, "symbolic link"),
    "weights of another name": (
        lambda folder: weights_of(folder).rename(folder / "quant_model_weight_other.safetensors"),
        ParametersInvalid,
        "quant_model_weight_w8a8.safetensors doesn't exist",
    ),
    "a type in lower case": (say_lower_case, ValueError, "'w8a8' is not a valid QuantAlgorithm"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_files_that_the_engine_refuses_are_refused(altered, route_of, name):
    damage, error, message = REFUSALS[name]
    folder = altered("static")
    path = description_of(folder)
    damage(folder)

    with pytest.raises(error, match=message):
        load(route_of("original", "bfloat16").deployed, path)


def test_a_description_of_a_rank_needs_ranks(altered, route_of):
    folder = altered("static")
    path = description_of(folder)
    described = path.rename(path.with_name("quant_model_description_w8a8_0.json"))
    weights_of(folder).rename(folder / "quant_model_weight_w8a8_3.safetensors")
    shutil.copy(described, folder / "quant_model_description_w8a8_3.json")

    with pytest.raises(ConfigError, match=r"initialised torch\.distributed"):
        load(route_of("original", "bfloat16").deployed, described)
    with pytest.raises(ParametersInvalid, match=r"description_w8a8_2.json doesn't exist"):
        load(route_of("original", "bfloat16").deployed, described, rank=2)


def test_an_export_in_parts_is_not_for_the_engine(route_of, tmp_path):
    route = route_of("original", "bfloat16")

    folder = write_export(route, CONFIGS["dynamic"][0], tmp_path / "export", part_size_bytes=100_000)

    with pytest.raises(ParametersInvalid, match=r"quant_model_weight_w8a8_dynamic.safetensors doesn't exist"):
        load(route.deployed, description_of(folder))


def test_a_step_beyond_the_tables_is_refused(export_of, route_of):
    loaded, _ = deploy(route_of("original", "bfloat16"), export_of("original", "timestep"))

    with pytest.raises(ParametersInvalid, match="max timestep set in quant weight: 4"):
        loaded.steps.set(5)
