"""How finished trials are held in memory, against the same trials as Optuna's own storage reads them."""

import json
import random
import sqlite3
from contextlib import closing

import optuna
import pytest
from optuna.trial import TrialState

from search.lean import CONFIG, RESULT, WORKER, LeanTrials, deflated, inflated
from search.storage import open_study
from search.trials import trial_config, trial_result


@pytest.fixture
def read(stored_store):
    """The finished trials of a stored study, by number, as we and as Optuna read them."""
    ours = open_study(stored_store, "demo").get_trials(deepcopy=False)
    optunas = optuna.load_study(study_name="demo", storage=f"sqlite:///{stored_store}/optuna.db").get_trials()
    return [(our, optuna_s) for our, optuna_s in zip(ours, optunas, strict=True) if our.state.is_finished()]


def test_lean_trials_say_what_is_stored(read):
    for ours, stored in read:
        assert ours.params == stored.params
        assert ours.distributions == stored.distributions
        assert ours.values == stored.values
        for name, value in stored.user_attrs.items():
            if name in (RESULT, CONFIG):
                assert json.loads(inflated(ours.user_attrs[name])) == (
                    json.loads(value) if isinstance(value, str) else value
                )
            else:
                assert ours.user_attrs[name] == value
        assert trial_config(ours) == trial_config(stored)
        assert trial_result(ours) == trial_result(stored)


def test_numbers_take_less_room():
    draw = random.Random(0)
    text = json.dumps({"values": [draw.random() for _ in range(500)]})

    assert len(deflated(text)) < 0.7 * len(text)


def test_what_trials_have_in_common_is_one_object(read):
    trials = [ours for ours, _ in read]
    distributions = {id(trial.distributions) for trial in trials}
    kinds = {tuple(trial.distributions.items()) for trial in trials}

    assert len(distributions) == len(kinds) < len(trials)


def test_the_database_keeps_text(stored_store, read):
    with closing(sqlite3.connect(stored_store / "optuna.db")) as database:
        texts = database.execute("SELECT value_json FROM trial_user_attributes WHERE key = 'config'").fetchall()

    assert texts
    assert all(isinstance(json.loads(text), dict) for (text,) in texts)


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.WAITING])
def test_trials_that_optuna_changes_are_left_alone(state):
    trial = optuna.create_trial(
        state=state,
        params={"x": 1},
        distributions={"x": optuna.distributions.IntDistribution(0, 2)},
        user_attrs={CONFIG: {"linear": None}, WORKER: {"pid": 1}},
    )
    distributions, attributes = trial.distributions, dict(trial.user_attrs)
    LeanTrials().lean(trial)

    assert trial.distributions is distributions
    assert trial.user_attrs == attributes


@pytest.mark.parametrize("value", ['{"psnr_db": NaN}', {"linear": None, "names": ["ü"]}, None])
def test_deflating_loses_nothing(value):
    stored = inflated(deflated(value))

    assert stored == value or json.loads(stored) == value


def test_what_is_not_deflated_is_given_back():
    assert inflated("text") == "text"
    assert inflated({"linear": None}) == {"linear": None}
