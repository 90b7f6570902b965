"""Observing each block behind quantized ones, on a real (tiny, random) HunyuanVideo transformer."""

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.observe import observe
from hyquant.calibration.sequential import blocks_in_order, needs_sequential_stats, observe_sequential
from hyquant.calibration.stats import act_range, merge
from hyquant.clock import StepClock
from hyquant.config import M4, LayerSelection, QuantConfig, W8A8Dynamic, W8A8Static, W8A8Timestep
from hyquant.errors import CalibrationError
from hyquant.models.base import Record, RenderSettings
from hyquant.models.tiny import TinyVideoModel
from hyquant.modules.swap import structural_twin, swapped
from hyquant.plan import QuantPlan, build_plan
from hyquant.quantize import quantize_, quantized_tensors, restore_

NUM_STEPS = 2
SETTINGS = RenderSettings(height=16, width=16, num_frames=1, num_steps=NUM_STEPS)
STATIC = QuantConfig(linear=W8A8Static(), calibration="sequential")
FIELDS = ("lo", "hi", "calls")


@pytest.fixture(scope="module")
def model():
    return TinyVideoModel()


@pytest.fixture(scope="module")
def records(model):
    return capture_in_memory(model, ["a red square", "two"], [0, 1], SETTINGS)


def plan_for(model, config: QuantConfig) -> QuantPlan:
    return build_plan(model.groups(), config, num_steps=NUM_STEPS)


def count_calls(module: nn.Module) -> tuple[list[int], Callable[[], None]]:
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls, handle.remove


def test_blocks_come_in_the_order_they_run_in(model, records):
    """Layers that the registration order puts into different blocks run in that order, outside layers included."""
    plan = plan_for(model, QuantConfig(linear=W8A8Static(), layers=LayerSelection(include=("*",))))
    ran: list[str] = []
    handles = [
        model.denoiser.get_submodule(layer.modules[0]).register_forward_pre_hook(
            lambda module, args, name=layer.name: ran.append(name)
        )
        for layer in plan.quantized
    ]
    model.denoiser(**records[0].inputs)
    for handle in handles:
        handle.remove()

    blocks = [
        [layer for layer in plan.quantized if layer.name.startswith(f"{block}.") or layer.name == block]
        for block in blocks_in_order(model.denoiser, plan)
    ]

    assert sum(map(len, blocks)) == len(plan.quantized)
    assert sorted(ran) == sorted(layer.name for layer in plan.quantized)
    in_trunk = [
        [layer.name for layer in block]
        for block in blocks
        if block[0].name.startswith(("double_blocks", "single_blocks", "final_layer"))
    ]
    places = [[ran.index(name) for name in names] for names in in_trunk]
    assert [len(names) for names in in_trunk] == [10, 10, 3, 3, 1, 1]
    assert all(max(earlier) < min(later) for earlier, later in pairwise(places))


def test_the_first_block_sees_float_inputs_and_later_ones_do_not(model, records):
    plan = plan_for(model, STATIC)
    single = observe(model.denoiser, model.groups(), records, model.clock)

    stats, _ = observe_sequential(model.denoiser, plan, records, model.clock)

    assert stats.keys() == {layer.name for layer in plan.quantized}
    for name, group in stats.items():
        is_equal = all(torch.equal(getattr(group, field), getattr(single[name], field)) for field in FIELDS)
        reads_no_tokens = name.endswith(("mod.linear", "modulation.linear"))
        assert is_equal == (name.startswith("double_blocks.0.") or reads_no_tokens), name
        torch.testing.assert_close(act_range(group, "minmax"), act_range(single[name], "minmax"), rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    "linear", [W8A8Static(), W8A8Timestep(timestep_sep=1)], ids=["static", "timestep, dynamic and static steps"]
)
@pytest.mark.parametrize("block", ["double_blocks.1", "single_blocks.1"])
def test_a_block_sees_what_a_denoiser_quantized_up_to_it_gives_it(model, records, linear, block):
    """By another way: quantize all earlier layers with the statistics found, and look at the block's inputs."""
    plan = plan_for(model, STATIC.model_copy(update={"linear": linear}))
    stats, _ = observe_sequential(model.denoiser, plan, records, model.clock)
    order = ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"]
    earlier = tuple(f"*{name}.*" for name in order[: order.index(block)])
    config = plan.config.model_copy(update={"layers": LayerSelection(include=earlier)})
    seen: dict[str, list[torch.Tensor]] = {}

    quantize_(model.denoiser, plan_for(model, config), stats, model.clock)
    handles = [
        model.denoiser.get_submodule(layer.modules[0]).register_forward_pre_hook(
            lambda module, args, name=layer.name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for layer in plan.quantized
        if layer.name.startswith(f"{block}.")
    ]
    with torch.inference_mode():
        for record in records:
            model.clock.set(record.step_index)
            model.denoiser(**record.inputs)
    for handle in handles:
        handle.remove()
    restore_(model.denoiser)

    assert len(seen) == (10 if block.startswith("double") else 3)
    for name, inputs in seen.items():
        for step_index in range(NUM_STEPS):
            rows = torch.cat(inputs[step_index::NUM_STEPS])
            assert torch.equal(stats[name].lo[step_index], rows.amin(dim=0))
            assert torch.equal(stats[name].hi[step_index], rows.amax(dim=0))


def test_smoothed_inputs_are_observed_behind_the_same_quantized_blocks(model, records):
    """The statistics of x * m have the extremes of the plain ones times m, channel by channel."""
    config = QuantConfig(linear=W8A8Static(act_method="mean_minmax"), smoothing=M4(), calibration="sequential")
    plan = plan_for(model, config)

    found = observe_sequential(model.denoiser, plan, records, model.clock)

    assert found.smoothed_stats.keys() == {layer.name for layer in plan.smoothed}
    quantize_(model.denoiser, plan, found.stats, model.clock, smoothed_stats=found.smoothed_stats)
    for layer in plan.smoothed:
        mul = model.denoiser.get_submodule(layer.modules[0]).fused.mul_scale
        assert torch.equal(found.smoothed_stats[layer.name].hi, found.stats[layer.name].hi * mul)
    restore_(model.denoiser)


def test_smoothing_scales_are_those_of_the_float_model(model, records):
    """As msModelSlim's are: its anti-outlier pass is over before it quantizes."""
    configs = [
        QuantConfig(linear=W8A8Static(), smoothing=M4(), calibration=way) for way in ("single_pass", "sequential")
    ]
    multipliers = []
    for config in configs:
        plan = plan_for(model, config)
        quantize_calibrated_(model.denoiser, plan, calibrate(model.denoiser, plan, records, model.clock), model.clock)
        multipliers.append(
            {
                path: layer["mul_scale"]
                for path, layer in quantized_tensors(model.denoiser).items()
                if "mul_scale" in layer
            }
        )
        restore_(model.denoiser)

    single, sequential = multipliers
    assert single.keys() == sequential.keys()
    assert len(single) > 0
    assert all(torch.equal(single[path], sequential[path]) for path in single)


def test_a_block_costs_one_pass_that_ends_at_it_but_for_the_first_record(model, records):
    plan = plan_for(model, STATIC)
    whole, stop = count_calls(model.denoiser)
    second, stop_second = count_calls(model.denoiser.transformer_blocks[1])
    last, stop_last = count_calls(model.denoiser.proj_out)

    observe_sequential(model.denoiser, plan, records, model.clock)
    for each in (stop, stop_second, stop_last):
        each()

    assert len(whole) == 4 * len(records)
    assert len(second) == 3 * len(records) + 1
    assert len(last) == 4


@pytest.mark.parametrize("act_method", ["minmax", "mean_minmax"])
def test_two_ranks_together_find_what_one_finds_alone(model, records, act_method):
    """Each rank has a denoiser and half of the records; a third rank has none, and runs no pass."""
    config = QuantConfig(linear=W8A8Static(act_method=act_method), smoothing=M4(), calibration="sequential")
    plan = plan_for(model, config)
    expected = observe_sequential(model.denoiser, plan, records, model.clock)
    shards: list[list[Record]] = [records[:1], records[1:], []]
    barrier, parts, found = threading.Barrier(len(shards), timeout=60), [{}, {}, {}], {}

    def run(rank: int) -> None:
        def join(own_pass):
            parts[rank] = own_pass() if shards[rank] else {}
            barrier.wait()
            merged = {name: merge(parts[0][name], parts[1][name]) for name in parts[0]}
            barrier.wait()
            return merged

        denoiser = structural_twin(model.denoiser)
        found[rank] = observe_sequential(denoiser, plan, shards[rank], StepClock(), join=join)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert bool(expected.smoothed_stats) == (act_method == "mean_minmax")
    for rank in range(len(shards)):
        for actual, wanted in zip(found[rank], expected, strict=True):
            assert actual.keys() == wanted.keys()
            for name, group in wanted.items():
                assert all(torch.equal(getattr(actual[name], field), getattr(group, field)) for field in FIELDS)


def test_an_error_leaves_the_denoiser_in_float(model, records):
    broken = [Record(r.step_index, r.prompt_index, dict(r.inputs)) for r in records]
    broken[1].inputs["hidden_states"] = torch.full_like(broken[1].inputs["hidden_states"], torch.inf)

    with pytest.raises(CalibrationError, match="must be finite"):
        observe_sequential(model.denoiser, plan_for(model, STATIC), broken, model.clock)

    assert swapped(model.denoiser) is None


def test_records_that_can_be_iterated_once_only_are_noticed(model, records):
    with pytest.raises(CalibrationError, match="must have records"):
        observe_sequential(model.denoiser, plan_for(model, STATIC), iter(records), model.clock)


def test_only_plans_that_need_statistics_need_sequential_ones(model):
    plans = {
        linear.kind: plan_for(model, QuantConfig(linear=linear, calibration="sequential"))
        for linear in (W8A8Dynamic(), W8A8Static())
    }

    assert not needs_sequential_stats(plans["w8a8_dynamic"])
    assert needs_sequential_stats(plans["w8a8_static"])
    assert not needs_sequential_stats(plan_for(model, QuantConfig(linear=W8A8Static())))
