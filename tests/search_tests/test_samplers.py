import warnings

import optuna
import pytest

from search.grid import tried_out
from search.samplers import chosen_kind, sampler_for
from search.study import SamplerConfig
from spaces.points import points
from spaces.space import SearchSpace
from spaces.suggest import suggest

SPACE = SearchSpace.model_validate(
    {
        "name": "s",
        "strategies": ["dynamic", "static", "timestep"],
        "timestep_sep_share": {"low": 0.0, "high": 0.5, "step": 0.25},
        "act_methods": ["minmax", "mix"],
        "exclusions": {"none": [], "tails": ["*fc2*"]},
    }
)
POINTS = [params for params, _ in points(SPACE, num_steps=4)]


def run(kind, num_trials, *, seed=0, enqueued=()):
    sampler = sampler_for(SamplerConfig(kind=kind), SPACE, seed=seed, num_steps=4, num_trials=num_trials)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for params in enqueued:
        study.enqueue_trial(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(num_trials):
            trial = study.ask()
            suggest(trial, SPACE, num_steps=4)
            study.tell(trial, [trial.number % 3, -trial.number % 5])
    return [trial.params for trial in study.trials]


def as_sets(params):
    return {frozenset(one.items()) for one in params}


def test_grid_tries_every_point_once_presets_among_them():
    found = run("grid", len(POINTS), enqueued=POINTS[5:8])

    assert found[:3] == POINTS[5:8]
    assert as_sets(found) == as_sets(POINTS)


def test_grid_goes_on_when_every_point_was_tried_and_orders_by_seed():
    assert len(run("grid", len(POINTS) + 3)) == len(POINTS) + 3
    assert run("grid", 4, seed=1) != run("grid", 4, seed=2)


def test_a_grid_is_done_when_no_point_is_left_queued_or_under_way():
    grid = sampler_for(SamplerConfig(kind="grid"), SPACE, seed=0, num_steps=4, num_trials=len(POINTS))
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=grid)

    def state():
        return grid.is_drained(study.trials), tried_out(grid, study.trials) is not None

    for _ in POINTS:
        assert state() == (False, False)
        trial = study.ask()
        suggest(trial, SPACE, num_steps=4)
        if trial.number + 1 < len(POINTS):
            study.tell(trial, [0.0, 0.0])
    assert state() == (True, False)  # it may be lost, and is queued again then
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    study.enqueue_trial(trial.params)
    assert state() == (False, False)
    study.tell(study.ask(), [0.0, 0.0])
    assert state() == (True, True)
    assert tried_out(None, study.trials) is None


def test_auto_is_grid_exactly_where_the_budget_covers_the_space():
    assert chosen_kind("auto", SPACE, num_steps=4, num_trials=len(POINTS)) == "grid"
    assert chosen_kind("auto", SPACE, num_steps=4, num_trials=len(POINTS) - 1) != "grid"


@pytest.mark.parametrize("kind", ["tpe", "gp", "nsga2", "random", "grid"])
def test_every_other_kind_stands_for_itself(kind):
    assert chosen_kind(kind, SPACE, num_steps=4, num_trials=1000) == kind
