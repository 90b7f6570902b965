"""The session API against msModelSlim 26.1.0 itself, by what it made of the same model and the same calls."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hyquant
from hyquant.modules.swap import quantized_tensors
from tests.toys.peer import CASES, DISABLED, peer_model, peer_records

GOLDEN = load_file(Path(__file__).resolve().parents[1] / "golden" / "msmodelslim-26.1.0.safetensors")
ROUNDING = 1e-4
"""Vectors are made by powers and divisions in another order: 1e-6 on the CPU that the peer ran on. Float sums of
another CPU end differently in the last place, an int8 code on a rounding edge flips, and what later blocks see moves:
4e-5."""
QUANTIZERS = {
    "w8a8": lambda: hyquant.W8A8ProcessorConfig(
        cfg=hyquant.W8A8QuantConfig(act_method="mean_minmax"), disable_names=list(DISABLED)
    ),
    "w8a8_dynamic": lambda: hyquant.W8A8DynamicProcessorConfig(
        cfg=hyquant.W8A8DynamicQuantConfig(act_method="mean_minmax"), disable_names=list(DISABLED)
    ),
    "w8a8_timestep": lambda: hyquant.W8A8TimeStepProcessorConfig(
        cfg=hyquant.W8A8TimeStepQuantConfig(act_method="mean_minmax", rows="suffix"),
        disable_names=list(DISABLED),
        timestep_sep=2,
    ),
}
SMOOTHINGS = {
    "m3": hyquant.M3ProcessorConfig,
    "m4": hyquant.M4ProcessorConfig,
    "m6": lambda: hyquant.M6ProcessorConfig(cfg=hyquant.M6Config(alpha=0.8, beta=0.2)),
    "m6_search": hyquant.M6ProcessorConfig,
}


def golden_layers(name):
    """Return the peer's tensors of a case by layer and kind; smoothed ones are `LAYER.div` and `LAYER.linear` there."""
    smoothed = {key.removesuffix(".div.mul_scale") for key in of_case(name) if key.endswith(".div.mul_scale")}
    layers = {}
    for key, tensor in of_case(name).items():
        owner, _, kind = key.rpartition(".")
        layer = owner.rpartition(".")[0] if owner.rpartition(".")[0] in smoothed else owner
        layers.setdefault(layer, {})[kind] = tensor
    return layers


def of_case(name):
    return {key.partition("/")[2]: tensor for key, tensor in GOLDEN.items() if key.startswith(f"{name}/")}


@pytest.fixture(scope="module")
def ours():
    """What the session API makes of each case, by layer and kind."""
    found = {}
    for name, case in CASES.items():
        processors = {case.quantizer: QUANTIZERS[case.quantizer]()}
        if case.smoothing is not None:
            processors[case.smoothing.partition("_")[0]] = SMOOTHINGS[case.smoothing]()
        model = peer_model(case.dtype)
        session_cfg = hyquant.SessionConfig(
            processor_cfg_map=processors,
            calib_data=peer_records(case.dtype, with_steps=case.quantizer == "w8a8_timestep"),
            device="cpu",
            calibration="sequential",
            deploy_dtype=str(case.dtype).removeprefix("torch."),
        )
        hyquant.quant_model(model, session_cfg)
        found[name] = quantized_tensors(model)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_same_layers_are_quantized_and_smoothed(ours, name):
    golden = golden_layers(name)

    assert ours[name].keys() == golden.keys()
    assert len(golden) == 18
    assert [layer for layer in ours[name] if "mul_scale" in ours[name][layer]] == [
        layer for layer in ours[name] if "mul_scale" in golden[layer]
    ]
    assert sum("mul_scale" in tensors for tensors in golden.values()) == (4 if CASES[name].smoothing else 0)


def weight_scale(tensors):
    """Return the scale of a layer's weight; a static layer stores its product with that of the input."""
    if "weight_scale" in tensors:
        return tensors["weight_scale"]
    return (tensors["deq_scale"] / tensors["input_scale"])[:, None]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.quantizer != "w8a8"])
def test_weight_scales_of_plain_layers_are_bit_equal(ours, name):
    for layer, golden in golden_layers(name).items():
        if "mul_scale" not in golden:
            assert torch.equal(weight_scale(ours[name][layer]), golden["weight_scale"].float()), layer


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smoothing or case.quantizer == "w8a8"])
def test_weight_scales_behind_a_product_are_equal_to_float_rounding(ours, name):
    """Of smoothed weights, and of static layers, where they are read back from their product with the input's."""
    for layer, golden in golden_layers(name).items():
        torch.testing.assert_close(weight_scale(ours[name][layer]), golden["weight_scale"], rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keeps_weights])
def test_int8_weights_are_equal_up_to_codes_on_a_rounding_edge(ours, name):
    for layer, golden in golden_layers(name).items():
        weight = ours[name][layer]["weight"]

        assert weight.dtype == golden["weight"].dtype == torch.int8
        if "mul_scale" not in golden:
            assert torch.equal(weight, golden["weight"]), layer
        else:  # of a product with a vector that is equal to rounding
            steps = (weight.int() - golden["weight"].int()).abs()
            assert steps.max() <= 1, layer
            assert (steps > 0).float().mean() < 1e-3, layer


def test_by_default_weights_of_a_bfloat16_model_are_nearer_than_the_peers():
    """The peer divides in bfloat16, whose 8 bits move codes by one; the nearest integer is taken unless asked."""
    model, exact = peer_model(torch.bfloat16), peer_model(torch.bfloat16)
    hyquant.quant_model(model, hyquant.SessionConfig(processor_cfg_map={"w8a8_dynamic": QUANTIZERS["w8a8_dynamic"]()}))
    found = quantized_tensors(model)
    for layer, golden in golden_layers("bfloat16_w8a8_dynamic").items():
        weight, scale = exact.get_submodule(layer).weight.double(), golden["weight_scale"].double()
        own, peer = ((kept["weight"] * scale - weight).norm() for kept in (found[layer], golden))

        assert own < peer, layer
        assert (found[layer]["weight"].int() - golden["weight"].int()).abs().max() == 1


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smoothing])
def test_smoothing_vectors_are_equal_to_float_rounding(ours, name):
    for layer, golden in golden_layers(name).items():
        if "mul_scale" in golden:
            assert golden["mul_scale"].amax() > 1.5 * golden["mul_scale"].amin()
            torch.testing.assert_close(ours[name][layer]["mul_scale"], golden["mul_scale"], rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.quantizer != "w8a8_dynamic"])
def test_activation_scales_are_within_six_percent(ours, name):
    """MsModelSlim quantizes each layer by what it has seen so far; here a block's statistics are complete first."""
    for layer, golden in golden_layers(name).items():
        assert ours[name][layer]["input_scale"].shape == golden["input_scale"].shape
        torch.testing.assert_close(ours[name][layer]["input_scale"], golden["input_scale"], rtol=0.06, atol=0)
        steps = 0.06 * 255
        assert (ours[name][layer]["input_offset"] - golden["input_offset"]).abs().max() <= steps


def test_rows_of_the_table_are_suffixes_and_not_single_steps(ours):
    """The last row is the last step alone, and the first is all steps: they differ by more than the tolerance above."""
    golden = golden_layers("w8a8_timestep")["double_blocks.0.img_attn_qkv"]["input_scale"]

    assert golden.shape == (4, 1)
    assert (golden[0] / golden[-1] - 1).abs() > 0.1
