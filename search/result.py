"""The outcome of one trial as a frozen value; what is logged, stored and reported.

`TrialResult` is JSON on disk and, as text, in the trial's user attribute "result". Its numbers carry units in their
names.
"""

from typing import Literal

from hyquant.config import FrozenModel, QuantConfig
from hyquant.latency_report import LatencyKind, LatencyReport
from search.provenance import Provenance

Outcome = Literal["complete", "infeasible", "stopped"]


class MetricResult(FrozenModel):
    """One metric over the search prompts: a value of each video, mean and standard deviation.

    There is one video of each prompt; of a config that was measured again one per fresh seed, all prompts with one seed
    before the next. `interval` is the 95 % bootstrap interval of the mean over prompts, BCa; None in results of old.
    """

    values: tuple[float, ...]
    mean: float
    std: float
    interval: tuple[float, float] | None = None


class TrialResult(FrozenModel):
    """Everything one trial found out.

    `values` are the objective values in the study's order; `constraints` holds, by metric, how far the bound is
    exceeded (> 0 means violated). `stage_seconds` are wall times by stage: calibrate, quantize, render, score,
    compile, latency, then `wait` (for locks and other slots) and `overhead`, which is everything else since the
    slot's previous trial.

    `num_prompts` is how many prompts were rendered where a trial was ended before all of them, and then `metrics` are
    over these alone; None is all. `stopped_by` is the front member that beat a stopped trial. `latent_l2` is the
    relative L2 error of the latents against float's by prompt and step, [P][N]; empty where it is not finite, and in
    results of old. `provenance` says what it rests on; None in results of old.
    """

    config: QuantConfig
    config_digest: str
    outcome: Outcome
    values: tuple[float, ...] | None
    metrics: dict[str, MetricResult]
    latency: LatencyReport | None
    constraints: dict[str, float]
    reason: str | None = None
    weight_bytes: int
    peak_memory_bytes: int | None = None
    stage_seconds: dict[str, float]
    latent_l2: tuple[tuple[float, ...], ...] = ()
    num_prompts: int | None = None
    stopped_by: int | None = None
    provenance: Provenance | None = None

    @property
    def latency_kind(self) -> LatencyKind | None:
        """Return what kind of latency was found; None if none was."""
        return None if self.latency is None else self.latency.kind

    @property
    def timed_on(self) -> str | None:
        """Return in words which device timed it; None if nothing was timed."""
        return None if self.latency is None else self.latency.timed_on

    @property
    def float_latency_s(self) -> float | None:
        """Return the seconds of the float loop that was timed in turns with the config's; None if nothing was."""
        return None if self.latency is None else self.latency.control_loop_latency_s
