import pytest

from hyquant.config import M4, FA3Fp8, LayerSelection, QuantConfig, W8A8Dynamic, W8A8Timestep
from hyquant.errors import ConfigError, LayerMatchError
from hyquant.models.attentions import AttentionBlock
from hyquant.models.names import LayerGroup
from hyquant.plan import QuantPlan, build_plan

GROUPS = (
    LayerGroup("double_blocks.0.img_attn_qkv", ("q", "k", "v"), 8, (8, 8, 8)),
    LayerGroup("double_blocks.0.img_mlp.fc1", ("fc1",), 8, (32,)),
    LayerGroup("double_blocks.0.img_mlp.fc2", ("fc2",), 32, (8,)),
    LayerGroup("single_blocks.0.linear1", ("linear1",), 8, (56,)),
    LayerGroup("final_layer.linear", ("proj_out",), 8, (4,)),
)


def test_every_layer_is_listed_with_its_decision_and_reason():
    config = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(exclude=("*fc2*",)))

    plan = build_plan(GROUPS, config, num_steps=4)

    assert {layer.name: (layer.scheme, layer.reason) for layer in plan.layers} == {
        "double_blocks.0.img_attn_qkv": ("w8a8_dynamic", "included by '*double_blocks*'"),
        "double_blocks.0.img_mlp.fc1": ("w8a8_dynamic", "included by '*double_blocks*'"),
        "double_blocks.0.img_mlp.fc2": (None, "excluded by '*fc2*'"),
        "single_blocks.0.linear1": ("w8a8_dynamic", "included by '*single_blocks*'"),
        "final_layer.linear": (None, "not included by any pattern"),
    }


def test_only_selected_layers_that_match_are_smoothed():
    config = QuantConfig(linear=W8A8Dynamic(), smoothing=M4(), layers=LayerSelection(exclude=("*fc1*",)))

    plan = build_plan(GROUPS, config, num_steps=4)

    assert [layer.name for layer in plan.smoothed] == ["double_blocks.0.img_attn_qkv", "single_blocks.0.linear1"]


def test_the_control_quantizes_nothing():
    plan = build_plan(GROUPS, QuantConfig(linear=None), num_steps=4)

    assert plan.quantized == ()


def test_a_timestep_sep_beyond_the_last_step_makes_every_step_dynamic():
    plan = build_plan(GROUPS, QuantConfig(linear=W8A8Timestep(timestep_sep=99)), num_steps=4)

    assert len(plan.quantized) == 4


def test_a_plan_survives_json():
    plan = build_plan(GROUPS, QuantConfig(linear=W8A8Timestep(timestep_sep=2), smoothing=M4()), num_steps=4)

    assert QuantPlan.model_validate_json(plan.model_dump_json()) == plan


def test_selecting_no_layer_is_an_error():
    config = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(include=("*fc2*",), exclude=("*img_mlp*",)))

    with pytest.raises(ConfigError, match="must select a layer"):
        build_plan(GROUPS, config, num_steps=4)


@pytest.mark.parametrize("linear", [None, W8A8Dynamic()], ids=["control", "nothing left to smooth"])
def test_smoothing_that_reaches_no_quantized_layer_is_an_error(linear):
    config = QuantConfig(linear=linear, smoothing=M4(layers=("*fc2*",)), layers=LayerSelection(exclude=("*fc2*",)))

    with pytest.raises(ConfigError, match="smoothing must reach a quantized layer"):
        build_plan(GROUPS, config, num_steps=4)


def test_a_smoothing_pattern_that_matches_nothing_is_an_error():
    config = QuantConfig(linear=W8A8Dynamic(), smoothing=M4(layers=("*atn_qkv",)))

    with pytest.raises(LayerMatchError, match=r"smoothing pattern '\*atn_qkv'"):
        build_plan(GROUPS, config, num_steps=4)


def test_a_loop_needs_a_step():
    with pytest.raises(ConfigError, match="num_steps must be at least 1, but got 0"):
        build_plan(GROUPS, QuantConfig(linear=W8A8Dynamic()), num_steps=0)


@pytest.mark.parametrize("target", ["mindie-sd-2.3/910b", "mindie-sd-3.1/910b", "mindie-sd-3.1/950"])
def test_a_deployment_in_float32_is_for_this_library_alone(target):
    """`mindiesd.quantize` takes torch.bfloat16 or torch.float16 as its dtype."""
    config = QuantConfig(linear=W8A8Dynamic(), deploy_dtype="float32")

    build_plan(GROUPS, config, num_steps=4)
    build_plan(GROUPS, config.model_copy(update={"deploy_dtype": "float16"}), num_steps=4, target=target)

    with pytest.raises(ConfigError, match=r"runs in bfloat16 or float16 .* but deploy_dtype is float32; deploy to"):
        build_plan(GROUPS, config, num_steps=4, target=target)


def test_heads_that_cannot_be_rotated_are_refused_before_calibration():
    blocks = [AttentionBlock(f"{kind}_blocks.0", f"{kind}.0", 2, 96) for kind in ("double", "single")]

    build_plan(GROUPS, QuantConfig(linear=None, attention=FA3Fp8(rotate=False)), num_steps=4, attentions=blocks)

    with pytest.raises(ConfigError, match=r"a power of two.*, but got 96; use rotate=False"):
        build_plan(GROUPS, QuantConfig(linear=None, attention=FA3Fp8()), num_steps=4, attentions=blocks)
