"""Limits of a first trial against the watchdog itself, on a clock of its own."""

import time
from pathlib import Path

import pytest

from search.planning import StepCosts
from search.rungs import rung_ends
from search.short_limits import in_sentences, short_limits
from search.study import RungsConfig, Slot, TimeoutsConfig
from search.study_file import load_study
from search.time_limits import StageLimits
from search.watchdog import Watchdog

CLIP_S = 3240.0
"""54 minutes: HunyuanVideo at 720p, 50 steps."""
COSTS = StepCosts(step_s=64.8, overhead_s=0.0, deployment_step_s=64.8)
STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture
def study():
    """8 search and 8 calibration prompts with the default limits, four hours at first."""
    return load_study(STUDIES / "hunyuan_video_720p.yaml").model_copy(update={"timeouts": TimeoutsConfig()})


def with_slots(study, ranks, **timeouts):
    return study.model_copy(update={"slots": (Slot(ranks=ranks),), "timeouts": TimeoutsConfig(**timeouts)})


def is_ended(timeouts, stage, takes_s):
    """Let the watchdog of a first trial look every ten seconds at a stage that takes so long."""
    told, now = [], [0.0]

    def clock():
        now[0] = min(now[0] + 10.0, takes_s)
        return now[0]

    dog = Watchdog(StageLimits(timeouts).limit_s, lambda: 0.0, told.append, clock=clock, tick_s=0.0)
    with dog.watching(stage):
        while not told and now[0] < takes_s:
            time.sleep(0.001)
    return bool(told)


@pytest.mark.parametrize(
    ("ranks", "stage", "seconds"),
    [
        (8, "calibrate", 2 * 54.0),
        (4, "calibrate", 4 * 54.0),
        (2, "calibrate", 8 * 54.0),
        (1, "calibrate", 16 * 54.0),
        (1, "floor", 8 * 54.0),
    ],
)
def test_what_the_watchdog_would_end_is_told_and_what_is_asked_for_is_enough(study, ranks, stage, seconds):
    """Minutes are seconds here. Also told is what would be ended if a step took nearly twice as long."""
    costs = StepCosts(step_s=1.08, overhead_s=0.0, deployment_step_s=1.08)
    planned = with_slots(study, ranks, first_s=240.0)
    short = short_limits(planned, costs)

    assert bool(short) == is_ended(planned.timeouts, stage, 1.9 * seconds)
    enough = with_slots(study, ranks, **{"first_s": 240.0, **short})
    assert not is_ended(enough.timeouts, stage, 1.9 * seconds)
    assert short_limits(enough, costs) == {}


def test_slots_of_different_ranks_are_judged_by_the_fewest(study):
    slots = (Slot(ranks=8), Slot(ranks=1))
    assert short_limits(study.model_copy(update={"slots": slots}), COSTS) == {"first_s": 32 * CLIP_S}


def test_a_stage_with_a_limit_of_its_own_needs_that_one(study):
    """24 prompts on one rank: float clips are rendered in one go, a trial's after rungs of 8, 8 and 8."""
    workload = study.workload.model_copy(update={"num_search_prompts": 24, "num_calibration_prompts": 1})
    long = with_slots(study, 1, stages={"render": 3600}).model_copy(
        update={"workload": workload, "rungs": RungsConfig(prompts=(8, 16))}
    )

    assert rung_ends((8, 16), 24, 1) == (8, 16, 24)
    assert short_limits(long, COSTS) == pytest.approx({"first_s": 48 * CLIP_S, "stages.render": 16 * CLIP_S})
    assert in_sentences({"stages.render": 16 * CLIP_S}, long.timeouts, "8 x 1") == [
        "timeouts.stages.render must be 2 times what a stage takes in the first trial of 8 x 1, 7 h 12 min, but is 60 "
        "min: the stage may be ended as hung; set it to 51840 or more"
    ]


def test_a_study_without_paired_metrics_measures_no_floor(study):
    plain = with_slots(study, 1, first_s=10**6, stages={"floor": 60}).model_copy(update={"metrics": ("clip_prompt",)})

    assert short_limits(plain, COSTS) == {}
    assert short_limits(plain.model_copy(update={"metrics": study.metrics}), COSTS) == {"stages.floor": 16 * CLIP_S}


def test_the_shipped_study_gives_its_slots_and_those_it_names_enough_time():
    shipped = load_study(STUDIES / "hunyuan_video_720p.yaml")

    for ranks in (8, 4, 2):
        assert short_limits(shipped.model_copy(update={"slots": (Slot(ranks=ranks),)}), COSTS) == {}
