"""Which layout of slots is faster: the same devices as one slot of many ranks, many slots of one rank, or in between.

With P prompts, N slots of R ranks, clips of c seconds and latencies of l seconds a trial:

    renders of a trial = ceil(P / R) * c        ranks share the prompts of a phase
    a trial            = renders + N * l        slots work side by side, but a latency is measured alone on the host:
                                                while it runs all other slots are paused
    trials an hour     = 3600 * N / trial
    M members again    = ceil(P / R) * c for float, then ceil(M / N) times as much for them, then M * l
    a study            = calibration and float renders, once and on one slot, the trials, then the members
                         (`search.planning`)

Every rank holds one model, so layouts of equally many ranks need the same memory.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from search.planning import StepCosts, phases
from search.progress import in_words
from search.short_limits import short_limits
from search.study import Slot, StudyConfig


@dataclass(frozen=True)
class Layout:
    """One layout of slots and what the study takes with it.

    Attributes:
        slots: Number of slots.
        ranks: Ranks of each, and so models in memory.
        trial_s: Seconds from one trial of a slot to its next.
        trials_per_hour: Of all slots together, once what is made only once is there.
        once_s: What is made only once, calibration and float renders.
        renders_s: Renders of all trials of the budget.
        again_s: Renders of the front measured again, of float with its fresh seeds too.
        latency_s: Latencies of all trials, and of the front measured again.
        total_s: The study in all.
        short_limits: Which fields of `timeouts:` are too short for it, and the seconds they need
            (`search.short_limits`).
    """

    slots: int
    ranks: int
    trial_s: float
    trials_per_hour: float
    once_s: float
    renders_s: float
    again_s: float
    latency_s: float
    total_s: float
    short_limits: Mapping[str, float]

    @property
    def name(self) -> str:
        """Return it as study files have it."""
        return f"{self.slots} x {self.ranks}"


def layouts(
    config: StudyConfig, costs: StepCosts, num_devices: int, alone: StepCosts | None = None
) -> tuple[Layout, ...]:
    """Return every layout of one rank a device, fastest for this study first.

    Of two that take equally long the one with fewer slots comes first: the fewer trials are in flight, the more the
    sampler knows when it proposes the next. Layouts that leave whole slots' worth of devices idle are left out.

    Args:
        config: The study; its own slots do not count.
        costs: What was measured as one rank of these layouts computes.
        num_devices: Devices, 1 or more.
        alone: As `search.planning.phases` takes it.
    """
    counts = {num_devices // ranks: ranks for ranks in range(1, num_devices + 1)}
    found = [_layout(config, costs, alone, slots, ranks) for slots, ranks in counts.items()]
    return tuple(sorted(found, key=lambda layout: (layout.total_s, layout.slots)))


def reasoning(found: Sequence[Layout]) -> str:
    """Say in one sentence which layout is fastest and why, against the one that differs most in its number of slots."""
    best = found[0]
    if len(found) == 1:
        return f"{best.name} is the only layout of one device: {best.trials_per_hour:.3g} trials an hour"
    other = max(found[1:], key=lambda layout: abs(math.log(layout.slots / best.slots)))
    if other.total_s == best.total_s:
        why = "it is as fast with fewer trials in flight, of which the sampler learns more"
    else:
        parts = [
            ("the renders of its trials take", best.renders_s, other.renders_s),
            ("what is made only once takes", best.once_s, other.once_s),
            ("the renders of the front measured again take", best.again_s, other.again_s),
        ]
        what, own_s, other_s = max(parts, key=lambda part: part[2] - part[1])
        why = f"{what} {in_words(own_s)} against {in_words(other_s)}"
    return (
        f"{best.name} is fastest, with {in_words(best.total_s)} in all against {in_words(other.total_s)} of "
        f"{other.name}: {why}; latencies, {in_words(best.latency_s)}, are measured alone on the host and do not shrink "
        "with slots"
    )


def _layout(config: StudyConfig, costs: StepCosts, alone: StepCosts | None, slots: int, ranks: int) -> Layout:
    laid_out = config.model_copy(update={"slots": (Slot(ranks=ranks),) * slots})
    found = phases(laid_out, costs, alone)
    one = {phase.name: phase for phase in found}
    renders, latency = one["trial: renders"], one["trial: latency"]

    def sum_s(*names: str) -> float:
        return sum(one[name].total_s for name in names if name in one)

    trial_s = renders.seconds + slots * latency.seconds
    return Layout(
        slots=slots,
        ranks=ranks,
        trial_s=trial_s,
        trials_per_hour=3600 * slots / trial_s if trial_s > 0 else math.inf,
        once_s=sum_s("calibration", "float renders", "noise floor"),
        renders_s=renders.total_s,
        again_s=sum_s("measured again: float", "measured again: renders"),
        latency_s=sum_s("trial: latency", "measured again: latency"),
        total_s=sum(phase.total_s for phase in found),
        short_limits=short_limits(laid_out, costs),
    )
