"""Smoothing scales worked into weights: the float function stays, and whatever holds folded weights is exact."""

import pytest
import torch

from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.observe import observe
from hyquant.clock import StepClock
from hyquant.config import M4, FA3Int8, LayerSelection, QuantConfig, W8A8Dynamic, W8A8Static, W8A8Timestep
from hyquant.errors import ConfigError, ExportError
from hyquant.export import load_quantized, model_info, save_quantized, verify_export
from hyquant.models.base import RenderSettings
from hyquant.models.producers import junction_of
from hyquant.models.tiny import TinyVideoModel
from hyquant.modules.linear import QuantLinear
from hyquant.modules.swap import structural_twin
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, restore_, smoothing_multipliers
from hyquant.smoothing.folding import smoothed_twin

NUM_STEPS = 2
SETTINGS = RenderSettings(height=32, width=32, num_frames=1, num_steps=NUM_STEPS)
FOLDABLE = (
    "*img_attn_qkv",
    "*txt_attn_qkv",
    "*img_mlp.fc1",
    "*txt_mlp.fc1",
    "*attn_proj",
    "*single_blocks.*.linear1",
)
FLOAT_PRODUCERS = LayerSelection(exclude=("*img_mod*", "*txt_mod*", "*modulation*"))
ALL = M4(layers=FOLDABLE, placement="fold")


@pytest.fixture(scope="module")
def loaded():
    model = TinyVideoModel()
    records = capture_in_memory(model, ["a red square"], [0], SETTINGS)
    return model, records, observe(model.denoiser, model.groups(), records, model.clock)


@pytest.fixture
def model(loaded):
    yield loaded[0]
    restore_(loaded[0].denoiser)


def plan_of(model, smoothing, linear=None, layers=None, **target):
    config = QuantConfig(linear=linear or W8A8Dynamic(), smoothing=smoothing, layers=layers or LayerSelection())
    return build_plan(model.groups(), config, num_steps=NUM_STEPS, **target)


def outputs(denoiser, clock, records):
    results = []
    with torch.inference_mode():
        for record in records:
            clock.set(record.step_index)
            results.append(denoiser(**record.inputs, return_dict=False)[0].flatten())
    return torch.stack(results)


def strong_multipliers(plan):
    """Random multipliers over e^N(0, 1), one per unit: far from what a mistake could hide in."""
    generator = torch.Generator().manual_seed(0)
    return {
        layer.name: mul
        for unit in plan.smoothing_units
        for mul in [torch.randn(unit[0].in_features, generator=generator).exp()]
        for layer in unit
    }


@pytest.mark.parametrize("placement", ["multiplier", "fold"])
@pytest.mark.parametrize("pattern", FOLDABLE)
def test_smoothing_alone_leaves_the_float_output_unchanged(loaded, pattern, placement):
    model, records, _ = loaded
    plan = plan_of(model, M4(layers=(pattern,), placement=placement))
    expected = outputs(model.denoiser, model.clock, records)
    before = {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}

    twin = smoothed_twin(model.denoiser, plan, strong_multipliers(plan))

    actual = outputs(twin, model.clock, records)
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-5
    assert not torch.equal(actual, expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.denoiser.state_dict().items())


def test_folding_reaches_every_producer_and_changes_the_input_of_every_consumer(loaded):
    """What a folded layer reads is the old input times the multiplier: so no run-time product is missing."""
    model, records, stats = loaded
    plan = plan_of(model, ALL)
    multipliers = strong_multipliers(plan)

    twin = smoothed_twin(model.denoiser, plan, multipliers)
    seen = observe(twin, model.groups(), records, model.clock)

    for layer in plan.smoothed:
        torch.testing.assert_close(
            seen[layer.name].hi, stats[layer.name].hi * multipliers[layer.name], rtol=1e-4, atol=1e-4
        )
    assert {layer.name for layer in plan.layers if layer.folded and not layer.smoothed} == {
        *(f"double_blocks.{block}.{stream}_mod.linear" for block in (0, 1) for stream in ("img", "txt")),
        *(f"single_blocks.{block}.modulation.linear" for block in (0, 1)),
    }


@pytest.mark.parametrize("layers", [LayerSelection(), FLOAT_PRODUCERS], ids=["int8 producers", "float producers"])
@pytest.mark.parametrize(
    "linear", [W8A8Dynamic(), W8A8Static(), W8A8Timestep(timestep_sep=1)], ids=["dynamic", "static", "timestep"]
)
def test_a_folded_denoiser_stays_close_to_float_and_restoring_is_bit_exact(loaded, model, linear, layers):
    _, records, stats = loaded
    expected = outputs(model.denoiser, model.clock, records)
    floats = dict(model.denoiser.named_modules())
    plan = plan_of(model, ALL, linear, layers)

    quantize_(model.denoiser, plan, stats, model.clock)
    actual = outputs(model.denoiser, model.clock, records)
    twin_clock = StepClock()
    twin = structural_twin(model.denoiser, twin_clock)
    restore_(model.denoiser)

    assert 0 < ((actual - expected).norm() / expected.norm()).item() < 0.02
    assert torch.equal(outputs(model.denoiser, model.clock, records), expected)
    assert dict(model.denoiser.named_modules()) == floats
    assert torch.equal(outputs(twin, twin_clock, records), actual)
    restore_(twin)
    assert torch.equal(outputs(twin, twin_clock, records), expected)


def test_folding_keeps_no_multiplier(loaded, model):
    _, _, stats = loaded

    quantize_(model.denoiser, plan_of(model, ALL), stats, model.clock)

    layers = [module for module in model.denoiser.modules() if isinstance(module, QuantLinear)]
    assert layers
    assert all("mul_scale" not in layer.tensors() for layer in layers)


def test_the_two_attention_projections_share_a_scale_worked_out_from_both(loaded):
    model, _, stats = loaded
    plan = plan_of(model, M4(layers=("double_blocks.0.*attn_proj",), placement="fold"))

    multipliers = smoothing_multipliers(model.denoiser, plan, stats)

    block = model.denoiser.transformer_blocks[0].attn
    act = torch.stack(
        [bound.abs() for layer in plan.smoothed for bound in (stats[layer.name].lo, stats[layer.name].hi)]
    ).amax(dim=(0, 1))
    weight = torch.cat((block.to_out[0].weight, block.to_add_out.weight)).abs().amax(dim=0)
    for layer in plan.smoothed:
        torch.testing.assert_close(multipliers[layer.name], (weight / act).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("layers", [LayerSelection(), FLOAT_PRODUCERS], ids=["int8 producers", "float producers"])
def test_a_folded_export_loads_bit_for_bit_and_verifies(loaded, model, tmp_path, layers, layout):
    _, records, stats = loaded
    plan = plan_of(model, ALL, W8A8Timestep(timestep_sep=1), layers)
    quantize_(model.denoiser, plan, stats, model.clock)
    expected = outputs(model.denoiser, model.clock, records)
    save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model), layout=layout)
    restore_(model.denoiser)

    assert load_quantized(model.denoiser, tmp_path / "export", model.clock) == plan
    assert torch.equal(outputs(model.denoiser, model.clock, records), expected)
    assert verify_export(tmp_path / "export", model).problems == ()


def test_an_engine_that_reads_quantized_layers_only_gets_no_folded_float_layer(loaded, model, tmp_path):
    _, _, stats = loaded
    plan = plan_of(model, ALL, layers=FLOAT_PRODUCERS)
    sentence = r"mindie-sd-3.1/910b loads .* folded into double_blocks.0.img_mod.linear \(6 in all\).*multiplier"
    quantize_(model.denoiser, plan, stats, model.clock)

    with pytest.raises(ExportError, match=sentence):
        save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model), target="mindie-sd-3.1/910b")
    with pytest.raises(ConfigError, match=sentence):
        plan_of(model, ALL, layers=FLOAT_PRODUCERS, target="mindie-sd-3.1/910b")
    assert not (tmp_path / "export").exists()


def test_an_engine_gets_what_is_folded_into_quantized_layers(loaded, model, tmp_path):
    _, _, stats = loaded
    plan = plan_of(model, ALL, target="mindie-sd-3.1/910b")
    quantize_(model.denoiser, plan, stats, model.clock)

    save_quantized(model.denoiser, plan, tmp_path / "export", model=model_info(model), target="mindie-sd-3.1/910b")

    restore_(model.denoiser)
    assert verify_export(tmp_path / "export", model).problems == ()


@pytest.mark.parametrize("pattern", ["*mlp.fc2", "*single_blocks.*.linear2", "*img_mod.linear"])
def test_what_no_linear_rows_produce_cannot_be_folded(loaded, pattern):
    with pytest.raises(ConfigError, match=r"must read what linear rows produce, but .*use placement multiplier"):
        plan_of(loaded[0], M4(layers=(pattern,), placement="fold"))


def test_one_of_two_readers_cannot_be_folded_alone_if_the_other_is_quantized(loaded):
    model = loaded[0]
    smoothing = M4(layers=("*img_attn_proj",), placement="fold")

    with pytest.raises(ConfigError, match=r"img_attn_proj is smoothed and .*txt_attn_proj is quantized without"):
        plan_of(model, smoothing)
    plan = plan_of(model, smoothing, layers=LayerSelection(exclude=("*txt_attn_proj",)))
    assert [layer.name for layer in plan.rewritten] == [f"double_blocks.{block}.txt_attn_proj" for block in (0, 1)]


def test_a_reader_that_stays_in_float_is_folded_along(loaded, model):
    _, records, stats = loaded
    expected = outputs(model.denoiser, model.clock, records)
    smoothing = M4(layers=("*img_attn_proj",), placement="fold")

    quantize_(
        model.denoiser,
        plan_of(model, smoothing, layers=LayerSelection(exclude=("*txt_attn_proj",))),
        stats,
        model.clock,
    )

    actual = outputs(model.denoiser, model.clock, records)
    assert ((actual - expected).norm() / expected.norm()).item() < 0.02


def test_stored_attention_scales_and_a_folded_v_exclude_each_other(loaded):
    config = QuantConfig(linear=W8A8Dynamic(), smoothing=ALL, attention=FA3Int8())

    with pytest.raises(ConfigError, match="int8 attention"):
        build_plan(loaded[0].groups(), config, num_steps=NUM_STEPS)


def test_junctions_are_named_after_their_block():
    junction = junction_of("double_blocks.7.txt_attn_proj")

    assert junction is not None
    assert junction.consumers == ("double_blocks.7.img_attn_proj", "double_blocks.7.txt_attn_proj")
    assert [rows.name for rows in junction.producers] == [
        "double_blocks.7.img_attn_qkv",
        "double_blocks.7.txt_attn_qkv",
    ]
    assert junction_of("final_layer.linear") is None
