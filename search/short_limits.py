"""Which `timeouts:` may end a sound first trial: limits that no trial has measured yet, beside what plan expects.

In a study's first trial nothing is known of any stage, so each has `first_s` or what `stages` gives it
(`search.time_limits`), however long it takes here. Clips of the noise floor and of candidates are not kept: a trial
that was ended is tried again with the same work, and never gets further. Each of these is one stage:

    calibrate    a rank's calibration prompts, captured and observed
    reference    a rank's search prompts
    floor        the same, under one neutral change
    render       a rank's prompts of the longest rung
    latency      all rounds
"""

from collections.abc import Mapping
from itertools import pairwise

from search.planning import StepCosts, calibration_s, has_floor, latency_s, renders_s
from search.progress import in_words
from search.rungs import rung_ends
from search.study import StudyConfig, TimeoutsConfig
from search.time_limits import StageLimits

HEADROOM = 2.0
"""How many times as long as expected a limit should be: float is what was measured, and a candidate may be slower."""


def short_limits(config: StudyConfig, costs: StepCosts) -> dict[str, float]:
    """Return the fields of `timeouts:` that are too short for a first trial, and how many seconds they need.

    {"first_s": 51840.0, "stages.render": 18000.0}, for example.
    """
    limits = StageLimits(config.timeouts)
    needed: dict[str, float] = {}
    for stage, seconds in _first_stages(config, costs).items():
        if HEADROOM * seconds > limits.limit_s(stage):
            field = f"stages.{stage}" if stage in config.timeouts.stages else "first_s"
            needed[field] = max(HEADROOM * seconds, needed.get(field, 0.0))
    return needed


def in_sentences(short: Mapping[str, float], timeouts: TimeoutsConfig, slots: str) -> list[str]:
    """Return one sentence for each limit that is too short.

    Args:
        short: What `short_limits` says.
        timeouts: The study's.
        slots: For which slots, in words.
    """
    given_s = {"first_s": timeouts.first_s, **{f"stages.{stage}": value for stage, value in timeouts.stages.items()}}
    return [
        f"timeouts.{field} must be {HEADROOM:g} times what a stage takes in the first trial of {slots}, "
        f"{in_words(seconds / HEADROOM)}, but is {in_words(given_s[field])}: the stage may be ended as hung; set it to "
        f"{seconds:.0f} or more"
        for field, seconds in short.items()
    ]


def _first_stages(config: StudyConfig, costs: StepCosts) -> dict[str, float]:
    """Return the seconds that stages of a first trial take on the slot with the fewest ranks."""
    ranks, num_prompts = min(slot.ranks for slot in config.slots), config.workload.num_search_prompts
    ends = rung_ends(() if config.rungs is None else config.rungs.prompts, num_prompts, ranks)
    longest = max(end - start for start, end in pairwise((0, *ends)))
    found = {
        "calibrate": calibration_s(config, costs, ranks=ranks),
        "reference": renders_s(config, costs, num_prompts, ranks=ranks),
        "render": renders_s(config, costs, longest, ranks=ranks),
        "latency": latency_s(config, costs),
    }
    return found | ({"floor": found["reference"]} if has_floor(config) else {})
