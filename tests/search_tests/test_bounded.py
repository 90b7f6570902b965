import time
import warnings

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState

from search.bounded import BoundedSampler, within_bound
from search.retry import known_experiments
from search.samplers import SAMPLERS, sampler_for
from search.study import SamplerConfig
from search.trials import is_dominated
from spaces.space import load_space
from spaces.suggest import suggest

NUM_STEPS = 50
BOTH = [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]


def drawn(num_points, sampler, study=None, space="mini"):
    """Ask for points and tell values that depend on the number alone; every fifth trial is infeasible."""
    here = load_space(space)
    study = study or optuna.create_study(directions=["minimize", "maximize"])
    study.sampler = sampler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(num_points):
            trial = study.ask()
            suggest(trial, here, num_steps=NUM_STEPS)
            if trial.number % 5 == 4:
                trial.set_constraint("collapsed", 1.0)
                study.tell(trial, state=TrialState.PRUNED)
            else:
                study.tell(trial, [trial.number * 7 % 11, trial.number * 5 % 13])
    return study


def long_study(num_trials):
    """A study on the largest space with many trials, whose parameters are those of 300 random points."""
    drafts = drawn(300, RandomSampler(0), space="hunyuan_video").get_trials(deepcopy=False)
    study = optuna.create_study(directions=["minimize", "maximize"])
    for index in range(num_trials):
        draft = drafts[index % 300]
        study.add_trial(
            optuna.create_trial(
                values=[float(index * 7919 % 10007), float(index * 104729 % 10009)],
                params=draft.params,
                distributions=draft.distributions,
            )
        )
    return study


def test_the_front_the_unfinished_and_the_newest_are_seen():
    study = drawn(60, RandomSampler(0))
    study.ask()
    trials = study.get_trials(deepcopy=False)
    complete = {t.number: (t.values[0], -t.values[1]) for t in trials if t.state == TrialState.COMPLETE}
    front = {number for number, own in complete.items() if not is_dominated(own, complete.values())}
    seen = {trial.number for trial in within_bound(trials, BOTH, 20)}

    others = sorted(set(range(60)) - front)
    assert 0 < len(front) < 10
    assert seen == front | set(others[-(20 - len(front)) :]) | {60}


def test_a_front_larger_than_half_leaves_room_for_new_trials():
    study = optuna.create_study(directions=["minimize", "maximize"])
    for index in range(40):
        study.add_trial(optuna.create_trial(values=[index, index] if index < 30 else [50, 0]))

    seen = [trial.number for trial in within_bound(study.get_trials(deepcopy=False), BOTH, 10)]

    assert seen == [25, 26, 27, 28, 29, 35, 36, 37, 38, 39]


def test_a_study_within_the_bound_is_searched_as_without_one():
    with known_experiments():
        plain, whole, tight = (SAMPLERS["tpe"](3, 8) for _ in range(3))
    expected = drawn(40, plain).trials

    assert [t.params for t in drawn(40, BoundedSampler(whole, most=40)).trials] == [t.params for t in expected]
    assert [t.params for t in drawn(40, BoundedSampler(tight, most=10)).trials] != [t.params for t in expected]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tpe", "gp", "nsga2", "random"])
def test_a_point_is_chosen_within_two_seconds_of_one_core_after_ten_thousand_trials(kind):
    config, here = SamplerConfig(kind=kind), load_space("hunyuan_video")
    sampler = sampler_for(config, here, seed=1, num_steps=NUM_STEPS, num_trials=20_000)
    study = drawn(1, sampler, long_study(10_000), space="hunyuan_video")  # the first loads libraries

    used_s = []
    for _ in range(3):
        started = time.process_time()
        drawn(1, sampler, study, space="hunyuan_video")
        used_s.append(time.process_time() - started)

    assert len(study.trials) == 10_004
    assert min(used_s) < 2.0, used_s  # other work on shared cores only adds
