"""Operations and seconds on paper: against torch's own count, and against a table that was worked out by hand."""

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hyquant.config import FA3Int8, LayerSelection, QuantConfig, W8A8Dynamic
from hyquant.cost import DeviceProfile, Efficiency, Tokens, modes_of, operations_by_kind, seconds_of, tokens_of, work_of
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import DeploymentShape
from hyquant.models.names import layer_groups
from hyquant.models.skeleton import published_skeleton
from hyquant.plan import build_plan

IDEAL = DeviceProfile(name="ideal 910B", peak_tflops={"bfloat16": 313, "int8": 626}, int8_attention=True)
SEED = ("*img_mod*", "*modulation*", "*fc2*")

# TFLOP of one step of HunyuanVideo 13B by kind at 720x1280x129 and 544x960x33, worked out by hand from its sizes.
OPERATIONS = {
    "img qkv": (134.5, 20.8),
    "img proj": (44.9, 6.9),
    "img fc1": (179.4, 27.7),
    "img fc2": (179.4, 27.7),
    "linear1": (269.7 + 359.5, 42.2 + 56.2),
    "linear2": (449.4, 70.3),
    "attention": (3483.5 + 6967.0, 85.2 + 170.3),
}

# clip: tokens, TFLOP, attention %, seconds in bfloat16, with the seed's layers in int8, with fc2, with attention too
STEPS = {
    (720, 1280, 129): (118800, 12068, 86.6, 38.56, 36.26, 35.97, 19.28),
    (720, 1280, 61): (57600, 3254, 75.8, 10.40, 9.28, 9.14, 5.20),
    (544, 960, 129): (67320, 4285, 78.6, 13.69, 12.39, 12.22, 6.85),
    (544, 960, 61): (32640, 1245, 64.1, 3.98, 3.34, 3.26, 1.99),
    (544, 960, 33): (18360, 508.5, 50.2, 1.63, 1.27, 1.22, 0.81),
    (544, 960, 17): (10200, 222.7, 36.2, 0.71, 0.51, 0.49, 0.36),
    (320, 512, 33): (5760, 108.4, 24.6, 0.35, 0.23, 0.22, 0.17),
    (320, 512, 17): (3200, 55.8, 15.8, 0.18, 0.11, 0.10, 0.09),
}


@pytest.fixture(scope="module")
def full():
    denoiser = published_skeleton()
    return layer_groups(denoiser), attention_blocks(denoiser)


def clip(height, width, num_frames):
    return DeploymentShape(height=height, width=width, num_frames=num_frames, num_steps=50)


def step_s(full, work, device, **options):
    groups, blocks = full
    plan = build_plan(groups, QuantConfig(**options), num_steps=50, attentions=blocks)
    return sum(seconds_of(work, device, modes_of(plan, device)).values())


@pytest.mark.parametrize("column", [0, 1])
def test_operations_by_kind_are_those_worked_out_by_hand(full, column):
    tokens = tokens_of(clip(*((720, 1280, 129), (544, 960, 33))[column]), text=256)
    found = operations_by_kind(work_of(*full, tokens))

    for kind, expected in OPERATIONS.items():
        assert found[kind] / 1e12 == pytest.approx(expected[column], rel=0.005)


@pytest.mark.parametrize("size", STEPS)
def test_seconds_and_gains_are_those_worked_out_by_hand(full, size):
    tokens, operations, attention, in_float, seed, with_fc2, everything = STEPS[size]
    counted = tokens_of(clip(*size), text=256)
    work = work_of(*full, counted)
    total = sum(part.operations for part in work)
    linear, all_blocks = W8A8Dynamic(), LayerSelection(exclude=SEED[:2])

    assert counted.video == tokens
    assert total / 1e12 == pytest.approx(operations, rel=0.002)
    assert 100 * operations_by_kind(work)["attention"] / total == pytest.approx(attention, abs=0.1)
    assert sum(seconds_of(work, IDEAL, {}).values()) == pytest.approx(in_float, abs=0.006)
    assert step_s(full, work, IDEAL, linear=linear, layers=LayerSelection(exclude=SEED)) == pytest.approx(
        seed, abs=0.006
    )
    assert step_s(full, work, IDEAL, linear=linear, layers=all_blocks) == pytest.approx(with_fc2, abs=0.006)
    assert step_s(full, work, IDEAL, linear=linear, layers=all_blocks, attention=FA3Int8()) == pytest.approx(
        everything, abs=0.006
    )


def test_operations_are_those_that_torch_counts():
    torch.manual_seed(0)
    denoiser = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=24,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 8, 12),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "encoder_attention_mask": torch.ones(2, 7),
        "pooled_projections": torch.randn(2, 12),
        "guidance": torch.full((2,), 6000.0),
    }
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser(**inputs)
    work = work_of(layer_groups(denoiser), attention_blocks(denoiser), Tokens(video=3 * 4 * 6, text=7), batch_size=2)
    # What is neither a Linear nor an attention of a block: the patch embedding and the refiner's attention.
    patches = 2 * 2 * 72 * (4 * 2 * 2) * 32
    refiner = 4 * 2 * 7 * 7 * 32

    assert sum(part.operations for part in work) == counter.get_total_flops() - patches - refiner


def test_efficiency_cards_and_quantizing_scale_seconds(full):
    work = work_of(*full, Tokens(video=1000, text=256))
    plain = DeviceProfile(name="plain", peak_tflops={"bfloat16": 100, "int8": 200})
    slow = plain.model_copy(update={"efficiency": Efficiency(linear=0.5, attention=0.25)})
    narrow = plain.model_copy(update={"bandwidth_gb_s": 100.0})
    modes = {"double_blocks.0.img_attn_qkv": "int8"}
    one, half = seconds_of(work, plain, {}), seconds_of(work, slow, {})

    assert half["img qkv"] == pytest.approx(2 * one["img qkv"])
    assert half["attention"] == pytest.approx(4 * one["attention"])
    assert seconds_of(work, plain.model_copy(update={"cards": 4}), {})["linear2"] == pytest.approx(one["linear2"] / 4)
    # 1000 rows of 3072 bfloat16 values are read and as many bytes written: 3 bytes each at 100 GB/s.
    quantizing = seconds_of(work, narrow, modes)["img qkv"] - seconds_of(work, plain, modes)["img qkv"]
    assert quantizing == pytest.approx(1000 * 3072 * 3 / 100e9)


def test_a_device_without_a_peak_of_its_float_dtype_is_refused():
    with pytest.raises(ValidationError, match="give peak_tflops of it"):
        DeviceProfile(name="x", dtype="float16", peak_tflops={"int8": 1})
