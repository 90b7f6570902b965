from collections import Counter

from tools.chaos.checks import non_dominated
from tools.chaos.faults import FAULTS
from tools.chaos.plan import DURATIONS_S, make_plan


def test_a_plan_follows_its_seed_and_has_every_kind_about_equally_often():
    plan = make_plan(50, 1, 10.0, num_workers=3)

    assert plan == make_plan(50, 1, 10.0, num_workers=3)
    assert plan != make_plan(50, 2, 10.0, num_workers=3)
    counts = Counter(fault.kind for fault in plan)
    assert counts.keys() == DURATIONS_S.keys() == FAULTS.keys()
    assert max(counts.values()) - min(counts.values()) <= 1
    assert [fault.start_s for fault in plan] == sorted(fault.start_s for fault in plan)


def test_the_front_is_what_nothing_else_beats_and_equals_do_not_beat_each_other():
    assert non_dominated({0: (1.0, 2.0), 1: (2.0, 1.0), 2: (2.0, 2.0), 3: (1.0, 2.0)}) == [0, 1, 3]
