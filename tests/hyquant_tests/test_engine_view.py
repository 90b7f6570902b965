"""What MindIE-SD does with a description, by hand-worked cases of its rules (mindiesd 3.1.0, `quantize`)."""

import pytest
from torch import nn

from hyquant.export.engine import engine_modules, engine_view
from hyquant.models.names import layer_groups
from hyquant.models.tiny import TinyVideoModel

T31, T23, T950 = "mindie-sd-3.1/910b", "mindie-sd-2.3/910b", "mindie-sd-3.1/950"
MODULES = {"block": False, "block.fc": True, "block.norm": False, "block.mod": False, "block.mod.linear": True}


def view(entries, target=T31, modules=MODULES):
    return engine_view({"model_quant_type": "W8A8", **entries}, modules, target)


def test_a_linear_is_found_by_its_weight():
    found = view({"block.fc.weight": "W8A8", "block.fc.weight_scale": "W8A8", "block.norm.weight": "FLOAT"})

    assert found.replaced == {"block.fc": "W8A8"}
    assert found.ignored == ()


def test_a_smoothed_linear_is_found_below_its_name():
    found = view({"block.fc.linear.weight": "W8A8_DYNAMIC", "block.fc.div.mul_scale": "FLOAT"})

    assert found.replaced == {"block.fc": "W8A8_DYNAMIC"}
    assert found.ignored == ()


def test_a_module_that_is_itself_called_linear_is_not_taken_for_a_smoothed_one():
    found = view({"block.mod.linear.weight": "W8A8"})

    assert found.replaced == {"block.mod.linear": "W8A8"}
    assert found.ignored == ()


def test_lower_case_algorithms_count():
    assert view({"block.fc.weight": "w8a8_timestep"}).replaced == {"block.fc": "W8A8_TIMESTEP"}


@pytest.mark.parametrize(
    ("entries", "name", "reason"),
    [
        ({"other.fc.weight": "W8A8"}, "other.fc", "no module of that name"),
        ({"other.fc.linear.weight": "W8A8", "other.fc.div.mul_scale": "FLOAT"}, "other.fc", "no module of that name"),
        ({"block.norm.weight": "W8A8"}, "block.norm", "is no Linear"),
        ({"block.fc.weight": "W8A8", "block.fc": "FLOAT"}, "block.fc", "FLOAT wins"),
        ({"block.fc.weight": "W4A8"}, "block.fc", "does not execute W4A8"),
        ({"block.fc.weight": "W8A16_GPTQ"}, "block.fc", "does not execute W8A16_GPTQ"),
        ({"block.fc.weight": "W8A8S"}, "block.fc", "does not execute W8A8S"),
        ({"block.fc.weight": "W8A8_MXFP8"}, "block.fc", "does not execute W8A8_MXFP8"),
        ({"block.fa_q.scale": "FAQuant", "block.fa_k.scale": "FAQuant"}, "block", "does not execute FAQuant"),
        ({"block.quant_type": "FP8_DYNAMIC"}, "block", "does not execute FP8_DYNAMIC"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_stays_in_float_is_named_once_with_the_reason(entries, name, reason):
    found = view(entries)

    assert found.replaced == {}
    assert [entry.name for entry in found.ignored] == [name]
    assert reason in found.ignored[0].reason


@pytest.mark.parametrize("target", [T23, "hyquant"])
def test_int8_attention_is_executed_where_it_is(target):
    found = view({"block.fa_q.scale": "FAQuant", "block.fa_v.scale": "FAQuant"}, target)

    assert found.attentions == {"block": "FAQUANT"}
    assert found.ignored == ()


def test_float8_attention_needs_the_950():
    assert view({"block.quant_type": "FP8_DYNAMIC"}, T950).attentions == {"block": "FP8_DYNAMIC"}


def test_diffusers_names_are_all_ignored_by_an_engine_with_original_ones():
    """The 0 of 547 trap: nothing matches, and nothing is said."""
    denoiser = TinyVideoModel(0).denoiser
    modules = engine_modules(denoiser, "original")
    linears = [path for group in layer_groups(denoiser) for path in group.modules]
    in_blocks = [path for path in linears if "blocks" in path and "refiner" not in path]
    found = view({f"{path}.weight": "W8A8" for path in in_blocks}, modules=modules)

    assert found.replaced == {}
    assert len(found.ignored) == len(in_blocks) > 0


def test_the_modules_of_an_engine_are_those_of_the_original_model():
    modules = engine_modules(TinyVideoModel(0).denoiser, "original")

    assert modules["double_blocks.0.img_attn_qkv"]
    assert modules["single_blocks.0.linear1"]
    assert modules["final_layer.linear"]
    assert not modules["double_blocks.0"]
    assert not modules["img_in.proj"]  # a Conv3d
    assert "transformer_blocks.0" not in modules


def test_any_other_module_has_its_own_names():
    assert engine_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "original") == {"0": True, "1": False}
