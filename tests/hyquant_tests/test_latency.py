"""Loop latency: modes are counted by their steps, both sides are timed in turns, and timing changes nothing."""

import gc
import weakref
from importlib import import_module
from operator import attrgetter

import pytest
import torch
from torch._dynamo.guards import CheckFunctionManager
from torch._dynamo.utils import get_metrics_context
from torch.compiler._cache import CacheArtifactManager
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hyquant import compiler_records
from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.observe import observe
from hyquant.compiling import can_compile, compile_blocks_
from hyquant.config import LayerSelection, QuantConfig, W8A8Dynamic, W8A8Static, W8A8Timestep
from hyquant.latency import LatencyBench, loop_latency, steps_by_mode
from hyquant.models import load_model
from hyquant.models.base import DeploymentShape, RenderSettings
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, restore_, structural_twin

SHAPE = DeploymentShape(height=32, width=32, num_frames=5, num_steps=8)
NUM_STEPS = 4


def plan_of(model, linear):
    return build_plan(model.groups(), QuantConfig(linear=linear), num_steps=NUM_STEPS)


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", "0", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def stats(model):
    settings = RenderSettings(height=32, width=32, num_frames=5, num_steps=NUM_STEPS)
    records = capture_in_memory(model, ["a red circle"], [0], settings)
    return observe(model.denoiser, model.groups(), records, model.clock)


@pytest.mark.parametrize(
    ("linear", "expected"),
    [
        (None, {"float": 8}),
        (W8A8Static(), {"static": 8}),
        (W8A8Dynamic(), {"dynamic": 8}),
        (W8A8Timestep(timestep_sep=1), {"dynamic": 2, "static": 6}),
        (W8A8Timestep(timestep_sep=0), {"static": 8}),
        (W8A8Timestep(timestep_sep=4), {"dynamic": 8}),
        (W8A8Timestep(timestep_sep=9), {"dynamic": 8}),
    ],
    ids=["float", "static", "dynamic", "timestep-1", "timestep-0", "timestep-all", "timestep-beyond"],
)
def test_timestep_sep_keeps_its_share_of_the_deployment_loop(model, linear, expected):
    assert steps_by_mode(plan_of(model, linear), 8) == expected


def test_a_loop_is_the_sum_of_its_steps():
    assert loop_latency({"dynamic": 2, "static": 6}, {"dynamic": 0.5, "static": 0.25}) == 2 * 0.5 + 6 * 0.25


def test_every_mode_of_a_plan_is_timed_beside_the_float_control(model, stats):
    plan = plan_of(model, W8A8Timestep(timestep_sep=2))
    quantize_(model.denoiser, plan, stats, model.clock)
    bench = LatencyBench(model, SHAPE, compile=False)

    report = bench.measure(bench.prepare(plan, warmup=1), rounds=3)
    restore_(model.denoiser)

    step = report.step_latency_s
    assert set(step) == {"control", "dynamic", "static"}
    assert report.loop_latency_s == pytest.approx(4 * step["dynamic"] + 4 * step["static"])
    assert report.control_loop_latency_s == pytest.approx(8 * step["control"])
    assert report.ratio == pytest.approx(report.loop_latency_s / report.control_loop_latency_s)
    assert not report.compiled


def test_timing_leaves_the_denoiser_and_its_clock_as_they_were(model, stats):
    plan = plan_of(model, W8A8Timestep(timestep_sep=2))
    quantize_(model.denoiser, plan, stats, model.clock)
    model.clock.set(1)
    inputs = model.deployment_inputs(SHAPE)
    with torch.inference_mode():
        before = model.denoiser(**inputs)
        bench = LatencyBench(model, SHAPE, compile=False)
        bench.measure(bench.prepare(plan, warmup=1), rounds=1)
        after = model.denoiser(**inputs)
    restore_(model.denoiser)

    assert model.clock.step_index == 1
    assert torch.equal(before[0], after[0])


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_twin_computes_what_the_denoiser_computes_and_does_not_disturb_others(model, stats):
    selection = LayerSelection(include=("*single_blocks.0*",))
    config = QuantConfig(linear=W8A8Dynamic(), layers=selection)
    plan = build_plan(model.groups(), config, num_steps=NUM_STEPS)
    inputs = model.deployment_inputs(SHAPE)
    with torch.inference_mode():
        float_output = model.denoiser(**inputs)[0]
        quantize_(model.denoiser, plan, stats, model.clock)
        quantized_output = model.denoiser(**inputs)[0]
        twin = structural_twin(model.denoiser, model.clock)
        compile_blocks_(twin)
        compiled_output = twin(**inputs)[0]
        restore_(model.denoiser)
        restored_output = model.denoiser(**inputs)[0]

    # The compiler reorders float32 additions, and an activation that sits on a rounding tie may move by one step.
    assert (compiled_output - quantized_output).norm() < 1e-3 * quantized_output.norm()
    assert torch.equal(restored_output, float_output)
    assert not torch.equal(quantized_output, float_output)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
def test_what_was_compiled_goes_with_its_denoiser(model):
    """A search compiles thousands of denoisers in one process; each left 5 MB behind before, and then up to 2."""

    def compiled_twin():
        twin = structural_twin(model.denoiser, model.clock)
        compile_blocks_(twin)
        with torch.inference_mode():
            twin(**model.deployment_inputs(SHAPE))
        return twin

    def alive() -> int:
        gc.collect()
        return sum(type(thing) in (CheckFunctionManager, ShapeEnv) for thing in gc.get_objects())

    def recorded() -> int:
        return len(CacheArtifactManager._seen_artifacts) + len(get_metrics_context()._edits)

    kept = compiled_twin()
    with torch.inference_mode():
        expected = kept(**model.deployment_inputs(SHAPE))[0]
    compiled_twin()
    before = alive()
    assert recorded() == 0
    gone = weakref.ref(twin := compiled_twin())
    assert recorded() > 0
    del twin

    assert alive() <= before  # fewer where an earlier test has left some, that die here
    assert gone() is None
    assert recorded() == 0
    with torch.inference_mode():
        assert torch.equal(kept(**model.deployment_inputs(SHAPE))[0], expected)


def test_what_cannot_be_compiled_is_timed_eagerly(monkeypatch):
    """torch.compile has no backend for an NPU, and on CUDA needs triton and a C compiler."""
    assert not can_compile(torch.device("meta"))
    monkeypatch.setattr("hyquant.compiling.row_kernels", lambda: None)
    assert not can_compile(torch.device("cuda"))
    monkeypatch.setattr("hyquant.compiling.row_kernels", object)
    assert can_compile(torch.device("cuda"))
    monkeypatch.setenv("PATH", "")
    assert not can_compile(torch.device("cpu"))


def test_the_records_of_compilations_are_those_of_this_torch():
    """What another version does not have is passed over, so that only this would tell."""
    tables = [attrgetter(path)(import_module(module)) for module, path in compiler_records._RECORDS]

    assert all(map(callable, tables))
    assert len(list(compiler_records._caches_of_shapes())) > 5
