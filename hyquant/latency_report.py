"""What a latency measurement says, as a frozen value; importing it loads no torch."""

import math
from typing import Literal

from hyquant.config import FrozenModel

KernelKind = Literal["native", "simulated"]
"""How a matrix product runs: on integer hardware instructions, or computed in float to the same integers."""

LatencyKind = Literal["native", "simulated", "predicted"]
"""Measured with kernels of one kind or the other, or worked out on paper for a device that is not there."""

TOLERANCE = 0.1
"""How far a gain may lie above its ceiling before it is called an error: parts are timed apart from the whole."""


class LatencyReport(FrozenModel):
    """Loop latency of a candidate and of the float control, both measured at `shape`.

    Attributes:
        loop_latency_s: The candidate's loop.
        control_loop_latency_s: The float loop.
        ratio: Candidate / control; below 1 is faster.
        ratio_mad: Median absolute deviation of the ratios of single rounds.
        ratio_interval: Low and high end of the 95 % bootstrap interval of `ratio` over rounds; None in old reports
            and if nothing was timed.
        step_latency_s: Median of one step by mode, the float control under "control".
        rounds, warmup: How many rounds were measured, and run before without being counted.
        shape: Height x width x frames, batch and steps.
        kind: "native" if every quantized layer runs on integer instructions here, else "simulated"; "predicted" if
            nothing ran, and rounds and warmup are 0 then.
        compiled: Whether both sides ran compiled.
        device: Torch's device type, with the number of CPU threads.
        kernels: Names of the kernels that quantized Linears ran on, and "native attention" or "simulated attention"
            where that is quantized; sorted, empty in float and in old reports.
        ceiling: The most that control / candidate can be by the float denoiser's profile; None if that is unknown.
        hardware: Which processor or card it was, by `hyquant.kernels.selection.device_name`; "" if nothing ran, and in
            old reports.
        profile_step_s: Seconds of a float step in that profile; the control's tells how far the machine has drifted.
    """

    loop_latency_s: float
    control_loop_latency_s: float
    ratio: float
    ratio_mad: float
    step_latency_s: dict[str, float]
    rounds: int
    warmup: int
    shape: str
    kind: LatencyKind
    compiled: bool
    device: str
    kernels: tuple[str, ...] = ()
    ceiling: float | None = None
    profile_step_s: float | None = None
    ratio_interval: tuple[float, float] | None = None
    hardware: str = ""

    @property
    def timed_on(self) -> str:
        """Return in words what timed it: latencies of two devices, or of one with other threads, are two quantities."""
        return f"{self.device} ({self.hardware})" if self.hardware else self.device

    @property
    def measurement_error(self) -> str | None:
        """Return in words that the gain is more than its ceiling allows, so that something was measured wrongly.

        Allowed are `TOLERANCE`, what float's step has drifted since the profile, and three median absolute deviations.
        """
        if self.ceiling is None:
            return None
        pair = self.step_latency_s.get("control"), self.profile_step_s
        drift = 0.0 if pair[0] is None or pair[1] is None else abs(math.log(pair[0] / pair[1]))
        if self.ratio >= 1 / (self.ceiling * (1 + TOLERANCE + drift)) - 3 * self.ratio_mad:
            return None
        return (
            f"the gain of {1 / self.ratio:.2f} is above the ceiling of {self.ceiling:.2f}: something else ran on this "
            "host meanwhile, or its clock changed; measure again"
        )

    @property
    def conditions(self) -> str:
        """Return in words what was measured on what: "native, compiled, cpu, 2 threads, kernel vnni"."""
        if self.kind == "predicted":
            return f"predicted, {self.device}"
        kernels = f", kernel {' and '.join(self.kernels)}" if self.kernels else ""
        return f"{self.kind}, {'compiled' if self.compiled else 'not compiled'}, {self.device}{kernels}"
