"""What a latency measurement says, as a frozen value; importing it loads no torch."""

from typing import Literal

from hyquant.config import FrozenModel

KernelKind = Literal["native", "simulated"]
"""How a matrix product runs: on integer hardware instructions, or computed in float to the same integers."""


class LatencyReport(FrozenModel):
    """Loop latency of a candidate and of the float control, both measured at `shape`.

    Attributes:
        loop_latency_s: The candidate's loop.
        control_loop_latency_s: The float loop.
        ratio: Candidate / control; below 1 is faster.
        ratio_mad: Median absolute deviation of the ratios of single rounds.
        step_latency_s: Median of one step by mode, the float control under "control".
        rounds, warmup: How many rounds were measured, and run before without being counted.
        shape: Height x width x frames, batch and steps.
        kind: "native" if every quantized layer runs on integer instructions here, else "simulated".
        compiled: Whether both sides ran compiled.
        device: Torch's device type, with the number of CPU threads.
        kernels: Names of the kernels that quantized Linears ran on, sorted; empty in float and in old reports.
    """

    loop_latency_s: float
    control_loop_latency_s: float
    ratio: float
    ratio_mad: float
    step_latency_s: dict[str, float]
    rounds: int
    warmup: int
    shape: str
    kind: KernelKind
    compiled: bool
    device: str
    kernels: tuple[str, ...] = ()

    @property
    def conditions(self) -> str:
        """Return in words what was measured on what: "native, compiled, cpu, 2 threads, kernel vnni"."""
        kernels = f", kernel {' and '.join(self.kernels)}" if self.kernels else ""
        return f"{self.kind}, {'compiled' if self.compiled else 'not compiled'}, {self.device}{kernels}"
