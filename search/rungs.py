"""When may a trial stop before all of its prompts are rendered? When a member of the front surely beats it.

Prompts are rendered in rungs, few at first. After a rung the trial is held against every member of the front that is at
least as good in all that is known exactly (latency, bytes). It is *beaten* if one of them is better in quality beyond
doubt, by one of two proofs:

    exact       even if every prompt to come were perfect, the member's value would not be reached
    by a test   the paired differences (same prompt, same seed) to the member are above 0: Student's t corrected for
                skewness (`metrics.statistics.non_inferiority.p_above`), one-sided

What the member lost on prompts that the trial has not rendered yet counts against the member: the differences must
exceed by how much its mean over all prompts is worse than that over the common ones. A member whose few ruined clips
are still to come does therefore not look spotless.

The error rate `alpha` is for one trial as a whole: it is divided by the number of rungs at which a trial may stop and
by the number of members that it is compared with at one (Bonferroni). With several objectives over prompts a member
must be better in each beyond doubt, which needs no further correction (an intersection-union test).

Source of the idea: racing and paired early stopping, as in Optuna's WilcoxonPruner, here for one objective of several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from metrics.statistics.non_inferiority import p_above
from search.metric_names import WORST
from search.outlook import NO_FLOORS, outlook
from search.result import MetricResult
from search.study import Objective

MIN_PROMPTS = 4
"""Fewer paired differences say nothing about their spread."""

_ROUNDING = 1e-6
"""Differences so small are roundings of a score: a cosine of a video with itself may differ from 1 by as much."""


@dataclass(frozen=True)
class Scored:
    """What is known of one config: of a member of the front all, of a trial under way the prompts so far.

    Attributes:
        number: The trial's number; None for one under way.
        results: Metrics over prompts by name, in the study's order of prompts.
        figures: Single numbers such as latency_ratio, by name.
        latency_kind: "native", "simulated" or "predicted"; latencies of two kinds are never compared.
        timed_on: Which device timed it, as `LatencyReport.timed_on`; nor are latencies of two devices.
    """

    number: int | None
    results: Mapping[str, MetricResult]
    figures: Mapping[str, float]
    latency_kind: str | None = None
    timed_on: str | None = None


@dataclass(frozen=True)
class Defeat:
    """Which member of the front beat a trial, and what shows it.

    Attributes:
        number: The member's trial number.
        num_prompts: On how many common prompts.
        p: The p value of the paired test, 0 if it is certain; to be held against `level`.
        level: What p had to be below.
        num_members: With how many members the trial was compared.
    """

    number: int | None
    num_prompts: int
    p: float
    level: float
    num_members: int

    def in_words(self) -> str:
        """Return the reason why a trial was stopped."""
        how = (
            "would stay better even if all other prompts were perfect"
            if self.p == 0.0
            else f"is better by a paired test (p = {self.p:.1g}, needed {self.level:.1g})"
        )
        return f"beaten by trial {self.number}, as good in all else: on {self.num_prompts} common prompts it {how}"


def rung_ends(prompts: Sequence[int], num_prompts: int, world_size: int) -> tuple[int, ...]:
    """Return after how many prompts each rung ends, the last one after all.

    A rung is rounded up to whole rounds of the ranks, because a rank without a prompt saves no time; rungs that leave
    nothing to save are left out.

    Example:
        >>> rung_ends((4, 8), 32, 3)
        (6, 9, 32)
    """
    rounded = {-(-count // world_size) * world_size for count in prompts}
    return (*sorted(count for count in rounded if MIN_PROMPTS <= count < num_prompts), num_prompts)


def beaten_by(
    trial: Scored,
    front: Sequence[Scored],
    objectives: Sequence[Objective],
    *,
    num_prompts: int,
    num_looks: int,
    alpha: float,
    floors: Mapping[str, Sequence[float]] = NO_FLOORS,
) -> Defeat | None:
    """Return the member of the front that beats a trial beyond doubt, the surest of them, or None.

    Args:
        trial: What is known of the trial; its results hold the first prompts.
        front: Members of the front, with all prompts; those that were timed otherwise than the trial beat nobody.
        objectives: The study's objectives.
        num_prompts: How many prompts the trial will have in the end.
        num_looks: At how many rungs the trial may be stopped.
        alpha: The most that a trial may risk of being stopped wrongly, over all looks and members.
        floors: Distances of the noise floor by metric, as `outlook` takes them.
    """
    names = {objective.metric.removesuffix(WORST) for objective in objectives}
    seen = min((len(trial.results[name].values) for name in names if name in trial.results), default=0)
    if seen < MIN_PROMPTS:
        return None
    alike = [m for m in front if (m.latency_kind, m.timed_on) == (trial.latency_kind, trial.timed_on)]
    rivals = [member for member in alike if all(_keeps_up(member, trial, o) for o in objectives)]
    if not rivals:
        return None
    level = alpha / (num_looks * len(rivals))
    doubts = [max(_doubt(rival, trial, o, num_prompts, floors) for o in objectives) for rival in rivals]
    p, surest = min(zip(doubts, rivals, strict=True), key=itemgetter(0))
    return Defeat(surest.number, seen, p, level, len(rivals)) if p <= level else None


def _keeps_up(member: Scored, trial: Scored, objective: Objective) -> bool:
    """Say whether a member is at least as good in an objective, if that is a single number."""
    own = trial.figures.get(objective.metric)
    return own is None or _sign(objective) * (member.figures[objective.metric] - own) >= 0.0


def _doubt(
    member: Scored, trial: Scored, objective: Objective, num_prompts: int, floors: Mapping[str, Sequence[float]]
) -> float:
    """Return how much doubt is left that a member is at least as good in an objective: 0 if certain, else a p value."""
    name, sign = objective.metric, _sign(objective)
    if name in trial.figures:
        return 0.0
    base = name.removesuffix(WORST)
    if base not in trial.results:
        return 1.0  # known of all prompts only, as latent_l2 is
    best = outlook(name, trial.results, num_prompts, floors)[1 if sign > 0 else 0]
    result = member.results[base]
    final = outlook(name, member.results, len(result.values))[0]
    if sign * (final - best) > _ROUNDING:
        return 0.0
    if name not in trial.results:
        return 1.0  # the worst prompt of few says nothing about that of all
    own = np.array(trial.results[name].values)
    other = np.array(result.values)
    common = other[: len(own)]
    to_come = max(0.0, sign * (float(common.mean()) - final))
    differences = sign * (common - own)
    if np.ptp(differences) == 0.0:
        return 1.0  # equal differences come from a score in steps, not from certainty
    return float(p_above(differences, to_come + _ROUNDING))


def _sign(objective: Objective) -> float:
    return 1.0 if objective.direction == "maximize" else -1.0
