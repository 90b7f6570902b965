"""How long the denoising loop takes, quantized and in float, measured in turns on the same device.

A quantization may run differently at different steps: `w8a8_timestep` is dynamic first and static later. So each mode
is timed on its own and the loop is put together from them; a plain median over steps would hide `timestep_sep`:

    loop latency = sum over modes of (number of steps in the mode) * (median seconds of one step in it)

In every round the float control runs once and then each mode of the candidate, so that slow drifts of the machine meet
both; the ratio of the two loops is what a search should use. Both sides are compiled block by block, or neither is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

import torch
from torch import nn

from hyquant.clock import StepClock
from hyquant.compiling import can_compile, compile_blocks_
from hyquant.config import W8A8Timestep
from hyquant.devices import resolve_device
from hyquant.kernels.selection import device_name
from hyquant.latency_interval import ratio_interval
from hyquant.latency_report import KernelKind, LatencyReport
from hyquant.models.base import DeploymentShape, VideoModel
from hyquant.modules.swap import attention_kinds, restore_, structural_twin, swapped
from hyquant.plan import QuantPlan
from hyquant.schemes import SCHEMES, Scheme

Mode = Literal["float", "dynamic", "static", "weight_only"]
Step = Callable[[], None]
_CONTROL = "control"


@dataclass(frozen=True)
class PreparedSteps:
    """One candidate ready to be timed: compiled, warmed up, a callable per mode (and for the float control)."""

    plan: QuantPlan
    steps: dict[str, Step]
    warmup: int
    kind: KernelKind
    kernels: tuple[str, ...]


class LatencyBench:
    """Times the quantizations of one model at one shape; the compiled float control is kept from one to the next.

    Attributes:
        model: The model.
        shape: The shape.
        is_compiled: Whether both sides are compiled.
        inputs: Keyword inputs of one denoiser call at the shape.
    """

    def __init__(self, model: VideoModel, shape: DeploymentShape, *, compile: bool = True) -> None:
        self.model = model
        self.shape = shape
        self.is_compiled = compile and can_compile(model.device)
        self.inputs = model.deployment_inputs(shape)
        self._control: nn.Module | None = None

    @property
    def device_description(self) -> str:
        """Return the device as reports name it."""
        return describe_device(self.model.device)

    @property
    def hardware(self) -> str:
        """Return which processor or card the device is."""
        return device_name(self.model.device)

    @property
    def description(self) -> str:
        """Return the shape as reports name it."""
        return describe(self.shape)

    def float_step_s(self, *, rounds: int, warmup: int) -> float:
        """Return the median seconds of one step of the float control, compiled if candidates are."""
        steps = {_CONTROL: self._step(self._float_control())}
        self._run_rounds(steps, warmup)
        return median(self._run_rounds(steps, rounds)[_CONTROL])

    def prepare(self, plan: QuantPlan, *, warmup: int) -> PreparedSteps:
        """Compile and warm up the denoiser as it is quantized now, and the float control.

        Args:
            plan: The plan that the model's denoiser was quantized by.
            warmup: Rounds to run without counting them; the first one compiles.
        """
        steps = {_CONTROL: self._step(self._float_control()), **self._candidate_steps(plan)}
        self._run_rounds(steps, warmup)
        kind: KernelKind = "native" if _is_native(self.model.denoiser) else "simulated"
        return PreparedSteps(plan=plan, steps=steps, warmup=warmup, kind=kind, kernels=kernels_of(self.model.denoiser))

    def measure(self, prepared: PreparedSteps, *, rounds: int) -> LatencyReport:
        """Time a prepared candidate against float; nothing else should run on this host meanwhile.

        Args:
            prepared: What `prepare` returned.
            rounds: Rounds that count; in each the control and every mode run once, in turns.
        """
        seconds = self._run_rounds(prepared.steps, rounds)
        counts = steps_by_mode(prepared.plan, self.shape.num_steps)
        middle = {name: median(values) for name, values in seconds.items()}
        loop_s = loop_latency(counts, middle)
        control_s = self.shape.num_steps * middle[_CONTROL]
        ratios = [
            loop_latency(counts, {mode: seconds[mode][index] for mode in counts})
            / (self.shape.num_steps * seconds[_CONTROL][index])
            for index in range(rounds)
        ]
        return LatencyReport(
            loop_latency_s=loop_s,
            control_loop_latency_s=control_s,
            ratio=loop_s / control_s,
            ratio_mad=median(abs(ratio - median(ratios)) for ratio in ratios),
            ratio_interval=ratio_interval(
                [(count, seconds[mode]) for mode, count in counts.items()], seconds[_CONTROL]
            ),
            step_latency_s=middle,
            rounds=rounds,
            warmup=prepared.warmup,
            shape=self.description,
            kind=prepared.kind,
            compiled=self.is_compiled,
            device=self.device_description,
            kernels=prepared.kernels,
            hardware=self.hardware,
        )

    def _float_control(self) -> nn.Module:
        if self._control is None:
            control = structural_twin(self.model.denoiser, StepClock())
            restore_(control)
            if self.is_compiled:
                compile_blocks_(control)
            self._control = control
        return self._control

    def _candidate_steps(self, plan: QuantPlan) -> dict[str, Step]:
        """Return one callable per mode the plan has; each runs one denoiser step in its mode."""
        clock = StepClock(plan.num_steps)
        candidate = structural_twin(self.model.denoiser, clock)
        if self.is_compiled:
            compile_blocks_(candidate)
        first_static = _first_static_step(plan)
        return {
            mode: self._step(candidate, partial(clock.set, first_static if mode == "static" else 0))
            for mode in steps_by_mode(plan, self.shape.num_steps)
        }

    def _step(self, denoiser: nn.Module, set_clock: Step | None = None) -> Step:
        def run() -> None:
            if set_clock is not None:
                set_clock()
            denoiser(**self.inputs)

        return run

    @torch.inference_mode()
    def _run_rounds(self, steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
        device = resolve_device(self.model.device.type)
        index = self.model.device.index or 0
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, run in steps.items():
                started = device.now_s(index)
                run()
                seconds[name].append(device.now_s(index) - started)
        return seconds


def steps_by_mode(plan: QuantPlan, num_steps: int) -> dict[Mode, int]:
    """Return how many of `num_steps` run in each mode; modes without steps are left out.

    `timestep_sep` keeps its share of the loop where the deployment has another number of steps than the plan.
    """
    linear = plan.config.linear
    if linear is None or not plan.quantized:
        return {"float": num_steps}
    if not isinstance(linear, W8A8Timestep):
        return {_only_mode(SCHEMES[linear.kind]): num_steps}
    num_dynamic = round(min(linear.timestep_sep, plan.num_steps) * num_steps / plan.num_steps)
    counts: dict[Mode, int] = {"dynamic": num_dynamic, "static": num_steps - num_dynamic}
    return {mode: count for mode, count in counts.items() if count}


def loop_latency(counts: dict[Mode, int], step_latency_s: dict[str, float]) -> float:
    """Return seconds of a whole loop from the seconds of one step in each of its modes."""
    return sum(count * step_latency_s[mode] for mode, count in counts.items())


def describe(shape: DeploymentShape) -> str:
    """Return a shape in words: "96x96x13, batch 1, 20 steps" (height x width x frames)."""
    size = f"{shape.height}x{shape.width}x{shape.num_frames}"
    return f"{size}, batch {shape.batch_size}, {shape.num_steps} steps"


def _only_mode(scheme: Scheme) -> Mode:
    if scheme.is_weight_only:
        return "weight_only"
    return "static" if scheme.needs_range else "dynamic"


def _first_static_step(plan: QuantPlan) -> int:
    linear = plan.config.linear
    return min(linear.timestep_sep, plan.num_steps - 1) if isinstance(linear, W8A8Timestep) else 0


def _is_native(denoiser: nn.Module) -> bool:
    state = swapped(denoiser)
    if state is None:
        return True
    linears = (module.kernel_kind for module in state.quantized.values())
    return all(kind == "native" for kind in (*linears, *attention_kinds(denoiser).values()))


def kernels_of(denoiser: nn.Module) -> tuple[str, ...]:
    """Return the names of the kernels that quantized Linears and attentions run on, sorted; none if it is in float."""
    state = swapped(denoiser)
    linears = () if state is None else state.quantized.values()
    names = {linear.fused.kernel_name for linear in linears}
    return tuple(sorted(names | {f"{kind} attention" for kind in attention_kinds(denoiser).values()}))


def describe_device(device: torch.device) -> str:
    """Return a device as reports name it."""
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
