"""Weight-only and 4-bit schemes: their arithmetic by numpy, exports in both layouts, what engines take, streaming."""

import numpy as np
import pytest
import torch
from torch import nn

from hyquant.checkpoint import quantize_checkpoint
from hyquant.config import M4, W4A8, W4A16, W8A16, LayerSelection, QuantConfig, W4A4Dynamic
from hyquant.errors import ConfigError, ExportError
from hyquant.export import load_quantized, model_info, save_quantized, verify_export
from hyquant.latency import steps_by_mode
from hyquant.models import load_model, mini
from hyquant.models.names import layer_groups
from hyquant.models.tiny import TinyVideoModel
from hyquant.modules.linear import quant_linears
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, quantized_tensors, restore_
from hyquant.schemes import SCHEMES, scheme_of

ENGINES = ("mindie-sd-2.3/910b", "mindie-sd-3.1/910b", "mindie-sd-3.1/950")
LINEARS = {
    "w8a16": W8A16(),
    "w4a16 in groups": W4A16(group_size=32),
    "w4a16": W4A16(group_size=0),
    "w4a8": W4A8(),
    "w4a4_dynamic": W4A4Dynamic(),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int4_by_loop(weight: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantize one group after the other; scales stay float32."""
    codes, scales = np.zeros(weight.shape, np.int64), []
    for row, out in zip(weight, codes, strict=True):
        scales.append([])
        for start in range(0, len(row), group_size):
            group = row[start : start + group_size]
            scale = np.float32(max(group.max() / np.float32(7), group.min() / np.float32(-8)))
            out[start : start + group_size] = np.clip(np.rint(group / scale), -8, 7)
            scales[-1].append(scale)
    return codes, np.array(scales, np.float32)


@pytest.mark.parametrize("group_size", [0, 32])
def test_int4_weights_agree_with_a_numpy_loop_over_groups(group_size):
    weight = normal(6, 96)

    tensors = scheme_of(W4A16(group_size=group_size)).build(weight, None, None, "float32")

    codes, scales = int4_by_loop(weight.numpy(), group_size or 96)
    np.testing.assert_array_equal(tensors["weight"].numpy(), codes)
    np.testing.assert_array_equal(tensors["weight_scale"].numpy(), scales)
    assert tensors["weight"].dtype == torch.int8
    assert {codes.min(), codes.max()} == {-8, 7}


def test_int4_codes_of_a_hand_worked_row():
    """Lowest -1.6 over 8 is 0.2, highest 0.66 over 7 is below 0.1: steps of 0.2."""
    tensors = scheme_of(W4A16(group_size=0)).build(torch.tensor([[-1.6, 0.66, 0.09, -0.53]]), None, None, "float32")

    assert tensors["weight"].tolist() == [[-8, 3, 0, -3]]
    assert tensors["weight_scale"].item() == pytest.approx(0.2)


@pytest.mark.parametrize("linear", LINEARS.values(), ids=LINEARS)
def test_scales_are_rounded_before_weights_are_divided_by_them(linear):
    weight = normal(16, 64)

    tensors = scheme_of(linear).build(weight, None, None, "bfloat16")

    scale = tensors["weight_scale"].repeat_interleave(64 // tensors["weight_scale"].shape[1], dim=1)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(tensors["weight"], torch.round(weight / scale).to(torch.int8))


@pytest.mark.parametrize("linear", [LINEARS["w8a16"], LINEARS["w4a16 in groups"], LINEARS["w4a16"]], ids=str)
@pytest.mark.parametrize("is_smoothed", [False, True])
def test_a_weight_only_layer_is_the_float_product_with_what_its_integers_stand_for(linear, is_smoothed):
    """By numpy in float64; the layer's float32 sums of 64 products are within 1e-5."""
    scheme = scheme_of(linear)
    tensors = dict(scheme.build(normal(12, 64), normal(12, seed=1), None, "bfloat16"))
    mul = torch.linspace(0.5, 2.0, 64) if is_smoothed else None
    (layer,) = quant_linears([tensors if mul is None else {**tensors, "mul_scale": mul}], scheme=scheme.name)
    x = normal(3, 5, 64, seed=2)

    actual = layer(x)

    scale = tensors["weight_scale"].double().numpy()
    floats = tensors["weight"].double().numpy() * scale.repeat(64 // scale.shape[1], axis=1)
    rows = x.double().numpy() * (1.0 if mul is None else mul.double().numpy())
    np.testing.assert_allclose(actual.numpy(), rows @ floats.T + normal(12, seed=1).numpy(), rtol=0, atol=1e-4)
    assert layer.kernel_kind == "simulated"
    assert layer.fused.kernel_name == "dequantized"


@pytest.mark.parametrize(("linear", "largest_code"), [(W4A8(), 127), (W4A4Dynamic(), 7)], ids=str)
def test_a_layer_with_int4_weights_and_integer_inputs_agrees_with_numpy(linear, largest_code):
    """Integers by numpy; three float32 operations follow. It runs on the kernels of int8, natively where they do."""
    scheme = scheme_of(linear)
    tensors = scheme.build(normal(12, 64), normal(12, seed=1), None, "bfloat16")
    (layer,) = quant_linears([tensors], scheme=scheme.name)
    int8_tensors = SCHEMES["w8a8_dynamic"].build(normal(12, 64), None, None, "bfloat16")
    (int8,) = quant_linears([int8_tensors], scheme="w8a8_dynamic")
    x = normal(5, 64, seed=2) * 3

    actual = layer(x)

    row_scale = np.abs(x.numpy()).max(axis=1, keepdims=True) / np.float32(largest_code)
    codes = np.rint(x.numpy() / row_scale).astype(np.int64)
    product = codes @ tensors["weight"].numpy().astype(np.int64).T
    scaled = product.astype(np.float32) * row_scale * tensors["weight_scale"].numpy()[:, 0]
    assert np.abs(codes).max() == largest_code
    np.testing.assert_allclose(actual.numpy(), scaled + normal(12, seed=1).numpy(), rtol=1e-6, atol=1e-6)
    assert layer.kernel_kind == int8.kernel_kind
    assert layer.fused.kernel_name == int8.fused.kernel_name


@pytest.mark.parametrize("linear", LINEARS.values(), ids=LINEARS)
def test_under_compile_a_layer_is_one_graph_and_computes_the_same(linear):
    """To float32: a compiler may sum in another order."""
    scheme = scheme_of(linear)
    members = [scheme.build(normal(rows, 64), None, None, "bfloat16") for rows in (6, 10)]
    first, second = quant_linears(members, scheme=scheme.name)
    first.fused.prepare()
    block = torch.compile(lambda x: torch.cat((first(x), second(x)), dim=-1), fullgraph=True, backend="aot_eager")
    x = normal(3, 64)

    torch.testing.assert_close(block(x), torch.cat((first(x), second(x)), dim=-1))


@pytest.fixture(scope="module")
def model():
    return TinyVideoModel(0)


@pytest.fixture
def quantized(model):
    """Quantize the tiny model, whose inner Linears have 32 and 128 inputs; float again afterwards."""

    def quantize(linear, **options):
        plan = build_plan(model.groups(), QuantConfig(linear=linear, **options), num_steps=4)
        return plan, quantize_(model.denoiser, plan, {}, model.clock)

    yield quantize
    restore_(model.denoiser)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", LINEARS)
def test_an_export_is_verified_and_loads_what_was_saved_bit_by_bit(model, quantized, tmp_path, name, layout):
    plan, _ = quantized(LINEARS[name])
    saved = quantized_tensors(model.denoiser)

    save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model), layout=layout)
    restore_(model.denoiser)
    report = verify_export(tmp_path / "export", model)
    load_quantized(model.denoiser, tmp_path / "export", model.clock)
    loaded = quantized_tensors(model.denoiser)

    assert report.problems == ()
    assert report.replaced == sum(1 if layout == "original" else len(layer.modules) for layer in plan.quantized)
    assert {path: tensors.keys() for path, tensors in loaded.items()} == {
        path: tensors.keys() for path, tensors in saved.items()
    }
    assert all(torch.equal(loaded[path][kind], saved[path][kind]) for path in saved for kind in saved[path])


def test_weights_beyond_the_bits_of_the_scheme_are_found(model, quantized, tmp_path):
    plan, _ = quantized(W4A16(group_size=32))
    first = next(iter(quantized_tensors(model.denoiser)))
    model.denoiser.get_submodule(first).fused.weight[0, 0] = 8

    save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model), layout="diffusers")

    (problem,) = verify_export(tmp_path / "export").problems
    assert problem.startswith(f"{first}.weight must hold integers in [-8, 7] as w4a16 has them, but holds")


@pytest.mark.parametrize("name", [name for name in LINEARS if "groups" not in name])
def test_a_folder_without_a_manifest_is_judged_by_its_description(model, quantized, tmp_path, name):
    plan, _ = quantized(LINEARS[name])
    save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model))
    restore_(model.denoiser)
    (tmp_path / "export" / "hyq_manifest.json").unlink()

    good, other = verify_export(tmp_path / "export", model), verify_export(tmp_path / "export", TinyVideoModel(1))

    assert good.problems == ()
    assert good.replaced == len(plan.quantized)
    assert len(good.layer_checks) > 0
    bits = scheme_of(LINEARS[name]).weight_bits
    assert f"must be the model's in int{bits} (cosine" in other.problems[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LINEARS)
def test_a_streamed_checkpoint_gives_the_same_bytes(tmp_path, name, dtype):
    config = QuantConfig(linear=LINEARS[name])
    loaded = load_model("hunyuan_video", "mini", dtype=dtype)
    plan = build_plan(loaded.groups(), config, num_steps=50)

    quantize_(loaded.denoiser, plan, {}, loaded.clock)
    save_quantized(loaded.denoiser, plan, tmp_path / "whole", model=model_info(loaded))
    quantize_checkpoint(mini.WEIGHTS, tmp_path / "streamed", config, dtype=dtype)

    (whole,), (streamed,) = ((tmp_path / name).glob("*.safetensors") for name in ("whole", "streamed"))
    assert streamed.name == whole.name
    assert streamed.read_bytes() == whole.read_bytes()
    assert verify_export(tmp_path / "streamed").ok


def planned(linear, target, *, bias=True, **options):
    module = nn.Sequential(nn.Linear(64, 32, bias=bias), nn.Linear(32, 64, bias=bias))
    config = QuantConfig(linear=linear, layers=LayerSelection(include=("*",)), **options)
    return build_plan(layer_groups(module), config, num_steps=4, target=target)


@pytest.mark.parametrize("target", ENGINES)
def test_engines_take_weights_with_one_scale_per_output_channel(target):
    assert len(planned(W8A16(), target).quantized) == 2
    assert len(planned(W4A16(group_size=0), target).quantized) == 2
    with pytest.raises(ConfigError, match="one scale per output channel of a w4a16 layer, but group_size is 32; use"):
        planned(W4A16(group_size=32), target)


@pytest.mark.parametrize("linear", [W8A16(), W4A16(group_size=0), W4A4Dynamic()], ids=str)
def test_engines_drop_the_multiplier_of_these_layers_so_it_is_refused(linear):
    smoothing = M4(layers=("0",))

    planned(linear, "hyquant", smoothing=smoothing)

    with pytest.raises(
        ConfigError, match=rf"does not multiply the input of a {linear.kind} layer, but smoothing would"
    ):
        planned(linear, "mindie-sd-3.1/910b", smoothing=smoothing)


def test_the_old_line_of_the_engine_does_not_know_w4a4():
    with pytest.raises(ConfigError, match=r"leaves w4a4_dynamic layers in float without a message, but the plan has 2"):
        planned(W4A4Dynamic(), "mindie-sd-2.3/910b", bias=False)


@pytest.mark.parametrize("target", ["mindie-sd-3.1/910b", "mindie-sd-3.1/950"])
def test_engines_drop_the_bias_of_w4a4_layers_so_those_with_one_are_refused(target):
    assert len(planned(W4A4Dynamic(), target, bias=False).quantized) == 2
    assert len(planned(W4A4Dynamic(), "hyquant").quantized) == 2

    with pytest.raises(ConfigError, match=r"wants the bias of a w4a4_dynamic layer but does not add it, and 0 has one"):
        planned(W4A4Dynamic(), target)


def test_inputs_of_4_bits_come_in_eights():
    module = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 4))
    config = QuantConfig(linear=W4A4Dynamic(), layers=LayerSelection(include=("*",)))

    with pytest.raises(ConfigError, match=r"a multiple of 8, but 0 has 20 \(1 such layers\); exclude the layer"):
        build_plan(layer_groups(module), config, num_steps=4)


@pytest.mark.parametrize("target", ENGINES)
def test_engines_ignore_w4a8_so_it_is_refused_and_shown(target, model, quantized, tmp_path):
    with pytest.raises(ConfigError, match="leaves w4a8 layers in float without a message, but the plan has 2 of them"):
        planned(W4A8(), target)
    plan, _ = quantized(W4A8())
    save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model))

    report = verify_export(tmp_path / "export", target=target)

    assert report.replaced == 0
    assert {ignored.reason for ignored in report.ignored} == {f"{target} does not execute W4A8"}
    assert len(report.ignored) == len(plan.quantized)


def test_groups_must_divide_the_input_channels():
    with pytest.raises(ConfigError, match=r"multiple of 128, but 0 has 64 \(2 such layers\); choose a group_size"):
        planned(W4A16(), "hyquant")


def test_an_export_in_groups_is_refused_for_an_engine(model, quantized, tmp_path):
    plan, _ = quantized(W4A16(group_size=32))

    with pytest.raises(ExportError, match="group_size is 32"):
        save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model), target="mindie-sd-3.1/910b")


@pytest.mark.parametrize("name", LINEARS)
def test_each_mode_of_a_loop_has_its_name(name):
    plan = planned(LINEARS[name], "hyquant")

    assert steps_by_mode(plan, 6) == {"weight_only" if name.endswith("16") or "groups" in name else "dynamic": 6}


def test_finer_weights_are_nearer_to_the_float_model(quantized):
    """Worst layer of the mini model: int8 above int4 in groups above int4 per channel, by decibels each."""
    loaded = load_model("hunyuan_video", "mini")
    sqnr_db = {}
    for name in ("w8a16", "w4a16 in groups", "w4a16"):
        plan = build_plan(loaded.groups(), QuantConfig(linear=LINEARS[name]), num_steps=4)
        report = quantize_(loaded.denoiser, plan, {}, loaded.clock)
        sqnr_db[name] = min(layer.weight_sqnr_db for layer in report.layers)

    assert sqnr_db["w8a16"] > sqnr_db["w4a16 in groups"] + 10
    assert sqnr_db["w4a16 in groups"] > sqnr_db["w4a16"] + 1
