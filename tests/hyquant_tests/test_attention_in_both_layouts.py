"""One HunyuanVideo in Tencent's modules and in diffusers': the same heads, scales, integers and exports."""

from dataclasses import asdict

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file

from hyquant.attention.observe import observe_attention
from hyquant.clock import StepClock
from hyquant.config import FA3Fp8, FA3Int8, QuantConfig, W8A8Dynamic
from hyquant.export import load_quantized, module_info, save_quantized, verify_export
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import Record
from hyquant.models.names import layer_groups, to_diffusers
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, restore_
from tests.toys.original_dit import random_toy, toy_inputs

INT8 = FA3Int8(ratio_qk=0.99)


@pytest.fixture(scope="module")
def toy():
    return random_toy(0)


@pytest.fixture(scope="module")
def diffusers(toy):
    sizes = asdict(toy.size) | {"out_channels": toy.size.in_channels}
    denoiser = HunyuanVideoTransformer3DModel(**sizes).eval().requires_grad_(False)
    denoiser.load_state_dict(to_diffusers(toy.state_dict()))
    return denoiser


@pytest.fixture
def both(toy, diffusers):
    """Each denoiser with keyword inputs of one call on two prompts, one of them padded; float again afterwards."""
    inputs = toy_inputs(toy.size, seed=1, text_lengths=(5, 2), num_text=5)
    names = {
        "x": "hidden_states",
        "t": "timestep",
        "text_states": "encoder_hidden_states",
        "text_mask": "encoder_attention_mask",
        "text_states_2": "pooled_projections",
        "guidance": "guidance",
    }
    yield (toy, inputs), (diffusers, {names[name]: value for name, value in inputs.items() if name in names})
    for denoiser in (toy, diffusers):
        restore_(denoiser)


def quantized(denoiser, inputs, attention, linear=None):
    """Observe and quantize on one call, and return statistics, plan and what the call gives then."""
    clock, blocks = StepClock(), attention_blocks(denoiser)
    stats = observe_attention(denoiser, blocks, [Record(0, 0, inputs)], clock, INT8)
    config = QuantConfig(linear=linear, attention=attention)
    plan = build_plan(layer_groups(denoiser), config, num_steps=1, attentions=blocks)
    quantize_(denoiser, plan, {}, clock, attention_stats=stats)
    return stats, plan, call(denoiser, inputs)


def call(denoiser, inputs):
    (output,) = denoiser(**inputs).values()
    return output


def test_both_layouts_have_the_same_blocks(both):
    (toy, _), (diffusers, _) = both

    found, expected = attention_blocks(toy), attention_blocks(diffusers)

    assert [(block.name, block.heads, block.head_dim) for block in found] == [
        (block.name, block.heads, block.head_dim) for block in expected
    ]
    assert [block.module for block in found] == [block.name for block in found]


def test_both_layouts_observe_the_same_and_compute_the_same_in_int8(both):
    plain = [call(*one) for one in both]
    (own_stats, _, own), (stats, _, expected) = (quantized(*one, INT8) for one in both)

    assert own_stats.keys() == stats.keys()
    for name in stats:
        torch.testing.assert_close(own_stats[name].lo, stats[name].lo, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_stats[name].hi, stats[name].hi, rtol=1e-5, atol=1e-5)
    # Products in another order; a value at the border of two codes may fall on either side.
    assert (own - expected).norm() < 2e-3 * expected.norm()
    assert (own - plain[0]).norm() > 5e-3 * plain[0].norm()


def test_both_layouts_compute_nearly_the_same_in_float8(both):
    """Padded tokens differ between the layouts, and take part in the scale of their block."""
    own, expected = (quantized(*one, FA3Fp8())[2] for one in both)

    assert (own - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("attention", [INT8, FA3Fp8()], ids=["int8", "fp8"])
def test_an_export_of_the_original_layout_loads_what_was_saved_and_is_that_of_diffusers(both, tmp_path, attention):
    for name, (denoiser, inputs) in zip(("toy", "diffusers"), both, strict=True):
        info = module_info(denoiser, source=name)
        _, plan, output = quantized(denoiser, inputs, attention, W8A8Dynamic())
        save_quantized(denoiser, plan, tmp_path / name, model=info)
        restore_(denoiser)
        assert load_quantized(denoiser, tmp_path / name, StepClock()) == plan
        assert torch.equal(call(denoiser, inputs), output)
        assert verify_export(tmp_path / name).problems == ()

    own, expected = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("toy", "diffusers"))
    assert own.keys() == expected.keys()
    for key in own:
        if ".fa_" in key or key.endswith("_rot"):
            torch.testing.assert_close(own[key], expected[key], rtol=2**-7, atol=0.0)
