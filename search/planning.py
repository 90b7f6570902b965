"""How long each phase of a study will take on this machine, from a few measured steps, and what precision it buys.

    render of a clip = overhead + steps * step        both measured with two short renderings of the study's clip
    calibration      = 2 * prompts * steps            once captured, once observed
    float renders    = prompts * clip
    trial            = prompts * clip + latency       scores, quantizing and compiling come on top
    latency          = rounds * (control + candidate) steps at the deployment shape; two candidate modes at most
    noise floor      = prompts * clip, for each neutral change that can be made; known from the store afterwards
    measured again   = for each member of the front, fresh seeds * prompts * clip + latency; renders once for float
    certificate      = 2 * prompts * seeds * clip     on one process; a step of its own clip is that of the deployment
                                                      shape if it has the same size, else scaled by operations

A candidate is taken to be as slow as float. Ranks share the prompts of a phase; slots work on trials, and then on
members of the front, at the same time. A latency is measured alone on the host, so those of all slots add up.
"""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from hyquant.cost import work_of
from hyquant.errors import ConfigError
from hyquant.latency import LatencyBench
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import DeploymentShape, RenderSettings, VideoModel
from hyquant.threads import threads_of_arithmetic
from metrics.registry import find_metric
from metrics.statistics.sample_sizes import POWER, power_below
from search.metric_names import has_excess
from search.neutral_changes import CHANGES
from search.profiling import tokens_at
from search.study import StudyConfig

_SHORT, _LONG = 1, 3
_NUM_VALUES = 256
WIDEST_MARGIN = 4.0
"""In standard deviations between prompts; a wider margin promises next to nothing."""
_MODES = 3  # the control, and a dynamic and a static step


@dataclass(frozen=True)
class StepCosts:
    """What was measured, in seconds.

    Attributes:
        step_s: One step of the study's clip.
        overhead_s: What a rendering takes beside its steps.
        deployment_step_s: One step at the deployment shape.
        certificate_step_s: One step of the certificate's clip, worked out of the others; None if it has none of its
            own.
    """

    step_s: float
    overhead_s: float
    deployment_step_s: float
    certificate_step_s: float | None = None


@dataclass(frozen=True)
class Phase:
    """One phase: its name, how many seconds it takes and how often it comes."""

    name: str
    seconds: float
    times: int

    @property
    def total_s(self) -> float:
        """Return the seconds of all of it."""
        return self.seconds * self.times


def measure_costs(model: VideoModel, config: StudyConfig, prompt: str, *, num_threads: int | None = None) -> StepCosts:
    """Time a few denoising steps of the float model at the study's clip and at its deployment shape.

    Args:
        model: The model, in float.
        config: The study.
        prompt: What to render.
        num_threads: In how many threads to compute, as many as a rank has where models run on the CPU; None leaves
            them alone.
    """
    settings = config.workload.settings
    with nullcontext() if num_threads is None else threads_of_arithmetic(num_threads):
        seconds = {count: _render_s(model, prompt, settings, count) for count in (_SHORT, _LONG, _SHORT, _LONG)}
        deployment = LatencyBench(model, config.deployment, compile=False).float_step_s(rounds=3, warmup=1)
    step_s = (seconds[_LONG] - seconds[_SHORT]) / (_LONG - _SHORT)
    costs = StepCosts(
        step_s=max(step_s, 0.0),
        overhead_s=max(seconds[_SHORT] - _SHORT * step_s, 0.0),
        deployment_step_s=deployment,
    )
    return replace(costs, certificate_step_s=certificate_step_s(model, config, costs))


def certificate_step_s(model: VideoModel, config: StudyConfig, costs: StepCosts) -> float | None:
    """Return the seconds of a step of one clip of the certificate, if that has a clip of its own.

    Pixels would be a poor measure: operations of attention grow with the square of the tokens. They stand in for a
    model that is not HunyuanVideo, whose tokens are not known.
    """
    clip = None if config.certificate is None else config.certificate.settings
    if clip is None:
        return None
    if _size(clip) == _size(config.deployment):
        return costs.deployment_step_s / config.deployment.batch_size
    own = config.workload.settings
    try:
        return costs.step_s * _operations(model, clip) / _operations(model, own)
    except ConfigError:
        return costs.step_s * math.prod(_size(clip)) / math.prod(_size(own))


def phases(config: StudyConfig, costs: StepCosts, alone: StepCosts | None = None) -> tuple[Phase, ...]:
    """Return the phases of a study in their order; the certificate is left out where the study has none.

    The budget, the neutral changes and the members of the front are counted in full: what ends sooner, cannot be made
    or is in the store already takes less.

    Args:
        config: The study.
        costs: What was measured as one rank of its slots computes.
        alone: What was measured as a process that has the machine to itself computes, as `certify` is; None if that is
            the same.
    """
    workload, ranks, num_slots = config.workload, config.slots[0].ranks, len(config.slots)
    render_s = renders_s(config, costs, workload.num_search_prompts, ranks=ranks)
    timed_s = latency_s(config, costs)
    found = [
        Phase("calibration", calibration_s(config, costs, ranks=ranks), 1),
        Phase("float renders", render_s, 1),
        Phase("noise floor", render_s, len(CHANGES) if has_floor(config) else 0),
        Phase("trial: renders", render_s, math.ceil(config.budget.trials / num_slots)),
        Phase("trial: latency", timed_s, config.budget.trials),
    ]
    if config.confirm is not None:
        again_s, members = config.confirm.seeds * render_s, config.confirm.members
        found.append(Phase("measured again: float", again_s, 1))
        found.append(Phase("measured again: renders", again_s, math.ceil(members / num_slots)))
        found.append(Phase("measured again: latency", timed_s, members))
    if config.certificate is not None:
        alone, settings = alone or costs, config.certificate.settings or workload.settings
        scale = math.prod(_size(settings)) / math.prod(_size(workload.settings))
        step_s = alone.step_s if alone.certificate_step_s is None else alone.certificate_step_s
        own_clip_s = scale * alone.overhead_s + settings.num_steps * step_s
        pairs = config.certificate.num_prompts * config.certificate.seeds_per_prompt
        found.append(Phase("certificate", 2 * pairs * own_clip_s, 1))
    return tuple(found)


def calibration_s(config: StudyConfig, costs: StepCosts, *, ranks: int) -> float:
    """Return the seconds in which so many ranks capture and observe the calibration prompts."""
    workload = config.workload
    return 2 * math.ceil(workload.num_calibration_prompts / ranks) * workload.settings.num_steps * costs.step_s


def renders_s(config: StudyConfig, costs: StepCosts, num_prompts: int, *, ranks: int) -> float:
    """Return the seconds in which so many ranks render so many clips."""
    return math.ceil(num_prompts / ranks) * (costs.overhead_s + config.workload.settings.num_steps * costs.step_s)


def latency_s(config: StudyConfig, costs: StepCosts) -> float:
    """Return the seconds of one latency; none where latencies are predicted."""
    rounds = config.latency.rounds + config.latency.warmup
    return 0.0 if config.latency.device_profile else rounds * _MODES * costs.deployment_step_s


def has_floor(config: StudyConfig) -> bool:
    """Say whether a metric of the study has a noise floor."""
    return any(has_excess(find_metric(name)) for name in config.metrics)


def half_width(num_prompts: int) -> float | None:
    """Return half of a 95 % interval of a mean over prompts, in standard deviations between prompts; None for one.

    Source: Student's t, for scores that are spread normally.
    """
    from scipy.stats import t

    return None if num_prompts < 2 else float(t.ppf(0.975, num_prompts - 1)) / math.sqrt(num_prompts)


def shown_margin(num_prompts: int, *, alpha: float, power: float = POWER) -> float | None:
    """Return the smallest margin, in standard deviations, that a model equal to float is shown to keep.

    None if that is none up to `WIDEST_MARGIN`.

    Args:
        num_prompts: Prompts of the certificate.
        alpha: Error rate of its test.
        power: In what share of tries it must be shown.
    """
    values = np.array([NormalDist().inv_cdf((index + 0.5) / _NUM_VALUES) for index in range(_NUM_VALUES)])

    def is_shown(margin: float) -> bool:
        return power_below(values, margin, num_prompts, alpha=alpha) >= power

    low, high = 0.0, WIDEST_MARGIN
    if not is_shown(high):
        return None
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if is_shown(middle) else (middle, high)
    return high


def precision(config: StudyConfig, spreads: Mapping[str, float]) -> list[str]:
    """Return in sentences what the prompts of a study tell.

    Args:
        config: The study.
        spreads: Standard deviation between prompts of the paired difference, averaged over seeds, by metric.
    """
    num_prompts = config.workload.num_search_prompts
    width = half_width(num_prompts)
    lines = ["a trial of one prompt says nothing about other prompts; take 8 or more"]
    if width is not None:
        lines = [
            f"a trial's mean over {num_prompts} prompts is known to +- {width:.2f} deviations{_in(width, spreads)}"
        ]
    if config.certificate is not None:
        certificate = config.certificate
        margin = shown_margin(certificate.num_prompts, alpha=certificate.alpha)
        shown = f"no margin of up to {WIDEST_MARGIN:g}" if margin is None else f"a margin of {margin:.2f}"
        tail = "; take more" if margin is None else _in(margin, spreads)
        lines.append(
            f"{certificate.num_prompts} held-out prompts show {shown} deviations in {POWER:.0%} of tries for a model "
            f"equal to float{tail}"
        )
    return lines


def _in(width: float, spreads: Mapping[str, float]) -> str:
    known = ", ".join(f"{metric} {width * spread:.3g}" for metric, spread in spreads.items())
    return f": {known}" if known else ""


def _render_s(model: VideoModel, prompt: str, settings: RenderSettings, num_steps: int) -> float:
    started = time.perf_counter()
    model.render([prompt], [0], settings.model_copy(update={"num_steps": num_steps}))
    return time.perf_counter() - started


def _size(clip: RenderSettings | DeploymentShape) -> tuple[int, int, int]:
    return clip.height, clip.width, clip.num_frames


def _operations(model: VideoModel, clip: RenderSettings) -> int:
    """Return the multiplications and additions of one step of one sample; ConfigError if it is no HunyuanVideo."""
    height, width, num_frames = _size(clip)
    shape = DeploymentShape(height=height, width=width, num_frames=num_frames, num_steps=1)
    tokens = tokens_at(LatencyBench(model, shape, compile=False))
    return sum(part.operations for part in work_of(model.groups(), attention_blocks(model.denoiser), tokens))
