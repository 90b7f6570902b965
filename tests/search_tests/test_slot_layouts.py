"""Layouts of slots against a simulation of slots that know of nothing but their own work and the lock of the host."""

import itertools

import pytest

from search.layouts import layouts, reasoning
from search.margins import CertificateConfig
from search.planning import StepCosts
from search.study import Budget, ConfirmConfig

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


@pytest.mark.parametrize("num_devices", [4, 6, 8])
@pytest.mark.parametrize("members", [1, 4, 6])
def test_the_front_measured_again_takes_what_simulated_slots_take(study, num_devices, members):
    """Every slot renders float with the fresh seeds first; then slots take members as they take trials."""
    again = study.model_copy(update={"confirm": ConfirmConfig(members=members, seeds=2)})
    without = {layout.name: layout for layout in layouts(study, COSTS, num_devices)}

    for layout in layouts(again, COSTS, num_devices):
        render_s = 2 * 18 * -(-8 // layout.ranks)
        seconds = render_s + simulate(slots=layout.slots, num_trials=members, render_s=render_s, latency_s=6)

        assert layout.total_s - without[layout.name].total_s == pytest.approx(seconds, rel=0.01), layout.name
        parts_s = layout.once_s + layout.renders_s + layout.again_s + layout.latency_s
        assert parts_s == pytest.approx(layout.total_s), layout.name


@pytest.mark.parametrize(
    ("num_devices", "num_prompts", "trials", "members"), [(4, 5, 8, 8), (6, 4, 24, 8), (6, 8, 24, 4), (8, 10, 24, 8)]
)
def test_the_fastest_layout_is_that_of_the_simulated_study(study, num_devices, num_prompts, trials, members):
    """Members counted one after the other made one slot of all ranks the fastest here."""
    workload = study.workload.model_copy(update={"num_search_prompts": num_prompts})
    confirm = ConfirmConfig(members=members, seeds=2)
    found = layouts(
        study.model_copy(update={"workload": workload, "budget": Budget(trials=trials), "confirm": confirm}),
        COSTS,
        num_devices,
    )

    def simulated_s(layout):
        render_s = 18 * -(-num_prompts // layout.ranks)
        calibration_s, float_and_floor_s, float_again_s = 2 * 4 * 2, 4 * render_s, 2 * render_s
        return (
            calibration_s
            + float_and_floor_s
            + simulate(slots=layout.slots, num_trials=trials, render_s=render_s, latency_s=6)
            + float_again_s
            + simulate(slots=layout.slots, num_trials=members, render_s=2 * render_s, latency_s=6)
        )

    assert found[0].slots > 1
    assert found[0] == min(found, key=simulated_s)


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


def test_the_front_measured_again_may_be_why(study):
    best = layouts(study.model_copy(update={"confirm": ConfirmConfig(members=8, seeds=8)}), COSTS, 8)

    assert "the renders of the front measured again take" in reasoning(best)


def test_the_certificate_is_that_of_a_process_that_has_the_machine_to_itself(study):
    certified = study.model_copy(update={"certificate": CertificateConfig(prompts="mini:heldout", num_prompts=3)})
    fast = StepCosts(step_s=0.2, overhead_s=1.0, deployment_step_s=0.05)
    without, alone = layouts(study, COSTS, 4)[0], layouts(certified, COSTS, 4, fast)[0]

    assert alone.total_s - without.total_s == pytest.approx(2 * 3 * certified.certificate.seeds_per_prompt * 1.8)


def test_one_device_has_one_layout(study):
    assert "only layout" in reasoning(layouts(study, COSTS, 1))
