"""Layouts of slots against a simulation of slots that know of nothing but their own work and the lock of the host."""

import itertools

import pytest

from search.layouts import layouts, reasoning
from search.planning import StepCosts
from search.study import Budget

COSTS = StepCosts(step_s=2.0, overhead_s=10.0, deployment_step_s=0.5)  # a clip of 4 steps takes 18 s


def simulate(*, slots, num_trials, render_s, latency_s):
    """Return when the last of some trials ends; second by second.

    A slot renders, then waits for the room and measures. While somebody measures or waits to, nobody renders.
    """
    todo, done = num_trials, 0
    left = {}  # seconds of rendering by slot
    waiting, measuring_left = [], 0
    for second in itertools.count():
        if done == num_trials:
            return second
        for slot in range(slots):
            if slot not in left and slot not in waiting and todo:
                left[slot], todo = render_s, todo - 1
        if not waiting:
            for slot in list(left):
                left[slot] -= 1
                if left[slot] == 0:
                    del left[slot]
                    waiting.append(slot)
            measuring_left = latency_s
        else:
            measuring_left -= 1
            if measuring_left == 0:
                waiting.pop(0)
                done, measuring_left = done + 1, latency_s
    return None


@pytest.fixture
def study(small_study):
    """8 prompts of 18 s, latencies of (3 + 1) * 3 * 0.5 = 6 s."""
    workload = small_study.workload.model_copy(update={"num_search_prompts": 8})
    return small_study.model_copy(update={"workload": workload, "budget": Budget(trials=24), "confirm": None})


@pytest.mark.parametrize("num_devices", [1, 4, 6, 8])
def test_trials_take_what_simulated_slots_take(study, num_devices):
    for layout in layouts(study, COSTS, num_devices):
        turns = -(-8 // layout.ranks)
        seconds = simulate(slots=layout.slots, num_trials=24, render_s=18 * turns, latency_s=6)

        assert layout.renders_s + layout.latency_s == pytest.approx(seconds, rel=0.01), layout.name
        if 24 % layout.slots == 0:
            assert layout.trials_per_hour == pytest.approx(24 / seconds * 3600, rel=0.01)


def test_layouts_of_eight_devices(study):
    found = {layout.name: layout for layout in layouts(study, COSTS, 8)}

    assert set(found) == {"8 x 1", "4 x 2", "2 x 4", "1 x 8"}
    assert found["1 x 8"].trial_s == 18 + 6
    assert found["8 x 1"].trial_s == 8 * 18 + 8 * 6


def test_more_ranks_than_prompts_idle_so_slots_win(study):
    workload = study.workload.model_copy(update={"num_search_prompts": 2})
    best = layouts(study.model_copy(update={"workload": workload}), COSTS, 8)

    assert best[0].slots > 1
    assert "renders of its trials take" in reasoning(best)


def test_ranks_win_where_slots_buy_nothing(study):
    """8 prompts on 8 ranks leave no rank idle, so trials are as fast in every layout; what is made once is faster."""
    best = layouts(study, COSTS, 8)

    assert best[0].name == "1 x 8"
    assert reasoning(best).startswith("1 x 8 is fastest")
    assert "what is made only once takes" in reasoning(best)
    assert "measured alone on the host" in reasoning(best)


def test_one_device_has_one_layout(study):
    assert "only layout" in reasoning(layouts(study, COSTS, 1))
