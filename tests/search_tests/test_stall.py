"""The hypervolume against an independent count, and when a study is said to have stopped getting better."""

import numpy as np
import optuna
import pytest

from search.hypervolume import hypervolume
from search.stall import growth, reference_point, stall_reason
from search.study import Budget


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_the_hypervolume_is_the_number_of_dominated_cells_of_a_grid(num_objectives):
    """Brute force: on integer points, count the unit cells whose best corner is dominated."""
    rng = np.random.default_rng(num_objectives)
    size = 8
    for num_points in (0, 1, 2, 5, 12):
        points = rng.integers(0, size + 2, (num_points, num_objectives))
        cells = np.stack(np.meshgrid(*[np.arange(size)] * num_objectives, indexing="ij"), axis=-1)
        is_dominated = np.zeros(cells.shape[:-1], dtype=bool)
        for point in points:
            is_dominated |= (cells >= point).all(axis=-1)

        volume = hypervolume([tuple(map(float, p)) for p in points], (float(size),) * num_objectives)

        assert volume == is_dominated.sum()


def test_the_reference_lies_a_tenth_beyond_the_front_and_one_hopeless_trial_does_not_move_it():
    front = [(0.0, 10.0), (2.0, 5.0), (4.0, 0.0)]

    assert reference_point([*front, (900.0, 900.0)]) == pytest.approx((4.4, 11.0))
    assert reference_point([(1.0, 1.0), (2.0, 3.0)]) == pytest.approx((2.1, 3.2))


def test_growth_is_a_share_of_todays_hypervolume_and_does_not_depend_on_units():
    before, now = [(0.0, 1.0), (1.0, 0.0)], [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)]
    scaled = [(100.0 * x, 1e-3 * y) for x, y in now]

    # With 1.1 as reference: 1.1^2 - 1 = 0.21 before; the new corner adds a square of 0.5.
    assert growth(before, now) == pytest.approx(0.25 / (0.21 + 0.25))
    assert growth(scaled[:2], scaled) == pytest.approx(growth(before, now))
    assert growth(now, now) == 0.0


def test_an_objective_that_never_differs_changes_nothing_in_the_growth():
    """Bytes of one scheme are equal; the growth is that of the other objectives alone."""
    before, now = [(0.0, 1.0), (1.0, 0.0)], [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)]
    with_bytes = [(x, 1.3e10, y) for x, y in now]

    assert growth(with_bytes[:2], with_bytes) == pytest.approx(growth(before, now))
    assert growth([(3.0, 5.0)], [(3.0, 5.0), (2.0, 5.0)]) > 0.5
    assert growth([(5.0,)], [(5.0,), (5.0,)]) == 0.0


def trials_with(*values):
    """Complete trials with these values; an infeasible one for None."""
    found = []
    for number, pair in enumerate(values):
        trial = optuna.create_trial(
            state=optuna.trial.TrialState.PRUNED if pair is None else optuna.trial.TrialState.COMPLETE,
            values=pair,
            constraints={"collapsed": 1.0} if pair is None else {},
        )
        trial.number = number
        found.append(trial)
    return found


DIRECTIONS = ("maximize", "minimize")
START = [(0.9, 0.9), (0.8, 0.7)]


@pytest.mark.parametrize(
    ("later", "is_over"),
    [
        ([(0.7, 0.95)] * 3, True),
        ([None] * 3, True),
        ([(0.7, 0.95)] * 2, False),
        ([(0.7, 0.95), (0.85, 0.75), (0.7, 0.95)], False),
        ([(0.95, 0.6), None, None], False),
    ],
    ids=["nothing new", "nothing feasible", "not for long enough", "a new member", "everything better"],
)
def test_a_study_is_over_when_so_many_evaluated_trials_brought_nothing(later, is_over):
    trials = trials_with(*START, *later)

    reason = stall_reason(trials, Budget(stall_trials=3), DIRECTIONS)

    assert (reason is not None) is is_over
    assert reason is None or "the last 3 evaluated trials" in reason


def test_a_study_without_a_complete_trial_before_has_not_stalled_and_without_the_option_none_does():
    nothing = trials_with(None, None, None, None)
    same = trials_with(*START, *START, *START)

    assert stall_reason(nothing, Budget(stall_trials=2), DIRECTIONS) is None
    assert stall_reason(same, Budget(), DIRECTIONS) is None
