"""Profiles of a float denoiser: every layer is in one part, and ceilings follow Amdahl's law."""

import pytest

from hyquant.config import LayerSelection, QuantConfig, W8A8Dynamic
from hyquant.latency import LatencyBench
from hyquant.latency_report import LatencyReport
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import DeploymentShape
from hyquant.models.tiny import TinyVideoModel
from hyquant.plan import build_plan
from hyquant.profile import DenoiserProfile, PartTime, ceiling, profile_denoiser, quantized_names

SHAPE = DeploymentShape(height=32, width=32, num_frames=5, num_steps=4)


def part(kind, layers, float_s, speedup):
    kernel = None if speedup == 1 else "vnni"
    return PartTime(kind=kind, layers=layers, size="", operations=0, float_s=float_s, speedup=speedup, kernel=kernel)


def profile(step_s, *parts):
    return DenoiserProfile(shape="", device="cpu", compiled=True, step_s=step_s, parts=parts)


@pytest.fixture(scope="module")
def model():
    return TinyVideoModel(0)


def test_every_layer_and_attention_is_in_one_part(model):
    found = profile_denoiser(LatencyBench(model, SHAPE, compile=False), rounds=1)
    names = [name for part in found.parts for name in part.layers]
    blocks = [block.name for block in attention_blocks(model.denoiser)]

    assert sorted(names) == sorted([*(group.name for group in model.groups()), *blocks])
    assert found.step_s > 0
    assert all(part.float_s > 0 for part in found.parts)
    assert found.compiled is False


def test_the_model_is_left_as_it_was(model):
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.denoiser.modules())
    processors = [block.attn.processor for block in model.denoiser.transformer_blocks]
    profile_denoiser(LatencyBench(model, SHAPE, compile=False), rounds=1)

    assert hooks == sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.denoiser.modules()
    )
    assert processors == [block.attn.processor for block in model.denoiser.transformer_blocks]


def test_operations_count_every_layer_of_a_part(model):
    found = profile_denoiser(LatencyBench(model, SHAPE, compile=False), rounds=1)
    (qkv,) = (part for part in found.parts if part.kind == "img qkv")
    group = next(group for group in model.groups() if group.name == qkv.layers[0])
    rows = int(qkv.size.split("x")[0])

    assert qkv.size == f"{rows}x{group.in_features}->{sum(group.out_features)}"
    assert qkv.operations == 2 * rows * group.in_features * sum(group.out_features) * len(qkv.layers)


def test_a_ceiling_is_what_amdahls_law_says():
    half = profile(10.0, part("img fc1", ("a", "b"), 5.0, 2.0), part("attention", ("c",), 3.0, 1.0))

    assert ceiling(half, ["a", "b"]) == pytest.approx(10 / 7.5)
    assert ceiling(half, ["a"]) == pytest.approx(10 / 8.75)
    assert ceiling(half, ["a", "b", "c"]) == pytest.approx(10 / 7.5)
    assert ceiling(half, []) == 1.0
    assert ceiling(half, ["unknown"]) == 1.0


def test_slow_kernels_give_no_ceiling_below_one():
    assert ceiling(profile(10.0, part("img fc1", ("a",), 5.0, 0.5)), ["a"]) == 1.0


def test_parts_longer_than_the_step_leave_no_rest():
    odd = profile(4.0, part("img fc1", ("a",), 3.0, 4.0), part("img fc2", ("b",), 3.0, 4.0))

    assert odd.rest_s == 0.0
    assert ceiling(odd, ["a", "b"]) > 1.0


def test_a_plan_names_what_it_quantizes(model):
    config = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(exclude=("*single_blocks*",)))
    plan = build_plan(model.groups(), config, num_steps=4)
    names = quantized_names(plan)

    assert names
    assert all(name.startswith("double_blocks.") for name in names)


@pytest.mark.parametrize(
    ("ratio", "mad", "is_error"),
    [
        (0.5, 0.0, False),
        (0.46, 0.0, False),
        (0.45, 0.0, True),
        (0.45, 0.01, False),
        (0.2, 0.01, True),
        (1.2, 0.0, False),
    ],
)
def test_a_gain_above_its_ceiling_is_a_measurement_error(ratio, mad, is_error):
    """Ceiling 2, so at least 0.5 of float's time; a tenth more gain is allowed (0.4545) and three deviations."""
    report = LatencyReport(
        loop_latency_s=ratio,
        control_loop_latency_s=1.0,
        ratio=ratio,
        ratio_mad=mad,
        step_latency_s={},
        rounds=3,
        warmup=1,
        shape="",
        kind="native",
        compiled=True,
        device="cpu",
        ceiling=2.0,
    )

    drifted = report.model_copy(update={"step_latency_s": {"control": 0.8}, "profile_step_s": 0.5})

    assert (report.measurement_error is not None) == is_error
    assert (drifted.measurement_error is not None) == (ratio == 0.2)
    assert report.model_copy(update={"ceiling": None}).measurement_error is None
