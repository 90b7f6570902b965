"""When a stage counts as hung: derived limits, injected clocks, and waits that do not count."""

from contextlib import contextmanager

import pytest

from hyquant.distributed import Group
from search.stages import Stages
from search.study import TimeoutsConfig
from search.time_limits import StageLimits
from search.watchdog import MAX_STEP_S, Watchdog


def test_limits_follow_the_longest_stage_seen():
    limits = StageLimits(TimeoutsConfig(factor=10, least_s=60, first_s=7200, stages={"judge": 5}))
    assert limits.limit_s("render") == 7200
    limits.learn({"render": 30.0, "latency": 2.0, "calibrate": 0.1, "wait": 9000.0})
    limits.learn({"render": 20.0, "latency": 8.0})

    assert limits.limit_s("render") == 300
    assert limits.limit_s("latency") == 80
    assert limits.limit_s("score") == 7200  # steady, and never seen
    assert limits.limit_s("calibrate") == 300  # may do much more than it has done so far
    assert limits.limit_s("judge") == 5
    StageLimits(TimeoutsConfig(factor=2, least_s=60)).learn({})


@pytest.mark.parametrize("num_prompts", [64, 128])
def test_a_trial_that_ended_at_its_first_rung_does_not_shorten_what_a_whole_one_may_take(num_prompts):
    """The last block of a trial of 64 prompts renders 56 of them, after a first trial that rendered 4."""
    limits = StageLimits(TimeoutsConfig(factor=10, least_s=60))

    limits.learn({"render": 240.0, "score": 8.0, "latency": 30.0}, share=4 / num_prompts)

    assert limits.limit_s("render") == pytest.approx(10 * 60.0 * num_prompts)
    assert limits.limit_s("score") == pytest.approx(10 * 2.0 * num_prompts)
    assert limits.limit_s("latency") == 300.0
    assert limits.limit_s("render", trials=11) == pytest.approx(10 * 60.0 * num_prompts * 11)
    assert limits.limit_s("reference", trials=11) == pytest.approx(10 * 60.0 * num_prompts * 11)


class Hours:
    """A clock that jumps by a step at every look."""

    def __init__(self, step_s: float) -> None:
        self.now, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


def looks_until_given_up(step_s: float, waited: Hours, limit_s: float, *, at_most: int) -> int:
    told: list[str] = []
    clock = Hours(step_s)
    dog = Watchdog(lambda _: limit_s, waited, told.append, clock=clock, tick_s=0.0)
    with dog.watching("render"):
        while not told and clock.now < step_s * at_most:
            pass
    return round(clock.now / step_s) if told else at_most + 1


def test_a_stage_over_its_limit_is_given_up_in_time():
    assert looks_until_given_up(1.0, Hours(0.0), 100.0, at_most=200) in range(100, 110)


@pytest.mark.parametrize("step_s", [3600.0, MAX_STEP_S])
def test_a_jump_of_the_clock_counts_as_one_short_look(step_s):
    looks = looks_until_given_up(step_s, Hours(0.0), 100.0, at_most=200)
    assert looks >= 100.0 / MAX_STEP_S


def test_waiting_for_locks_does_not_count():
    assert looks_until_given_up(1.0, Hours(1.0), 10.0, at_most=500) == 501


def test_waiting_for_an_equal_trial_elsewhere_or_for_the_database_is_not_watched():
    watched = []

    @contextmanager
    def watching(stage):
        watched.append(stage)
        yield

    stages = Stages(Group(), watching=watching)
    with stages.waiting():
        assert stages.current == "wait"
    assert stages.run_unwatched(lambda: "the front") == "the front"
    with stages.timed("render"):
        pass

    assert watched == ["render"]
    assert set(stages.seconds) == {"wait", "render"}
