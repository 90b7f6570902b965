"""What an evaluator's watchdogs are told, without a model."""

from types import SimpleNamespace

import optuna
import pytest
import torch

from search.evaluating import Evaluator
from search.locks import HostLock
from search.order import WorkOrder
from search.provenance import provenance_here
from search.study import ConfirmConfig
from search.trials import store_result


class Dog:
    """A watchdog that only remembers what it was made with."""

    made: list["Dog"]

    def __init__(self, limit_s, waited_s, give_up):
        self.limit_s, self.give_up, self.watching = limit_s, give_up, None
        Dog.made.append(self)


@pytest.fixture
def make_evaluator(study_config, tmp_path, monkeypatch):
    """An evaluator of a study of 64 prompts on one rank, whose front is measured again on eleven seeds each."""
    monkeypatch.setattr("search.evaluating.Watchdog", Dog)
    Dog.made = []
    bench = SimpleNamespace(
        config=study_config.model_copy(update={"confirm": ConfirmConfig(seeds=11)}),
        lock=HostLock(tmp_path / "locks"),
        group=SimpleNamespace(world_size=1),
        model=SimpleNamespace(device=torch.device("cpu")),
        pairs=[("prompt", seed) for seed in range(64)],
    )

    def make(*results):
        study = optuna.create_study(directions=["maximize", "minimize"])
        for result in results:
            store_result(study.ask(), result)
        order = WorkOrder(store=tmp_path, url=None, study="s", slot=0, first_trial=0, deadline=None, until_trial=None)
        return Evaluator(bench, study, order, followers=None, recorder=None)

    return make


def test_limits_are_those_of_whole_trials_and_of_all_seeds(make_evaluator, make_result):
    """The first trial stopped at its first rung, of 4 prompts; running out of memory at once tells nothing."""
    stopped = make_result(num_prompts=4, stage_seconds={"render": 240.0, "latency": 60.0})
    unfit = make_result(metrics={}, stage_seconds={"score": 1.0})

    make_evaluator(unfit, stopped).stages_again(3)

    usual, again = (dog.limit_s for dog in Dog.made)
    assert usual("render") == 10 * 64 * 60.0
    assert again("render") == 11 * usual("render")
    assert usual("latency") == 600.0
    assert usual("score") == 14_400.0


def test_limits_follow_slots_of_as_many_ranks_on_such_a_device(make_evaluator, make_result):
    """Eight ranks, or an accelerator, are done with a stage sooner than one rank on a CPU may be."""
    own = provenance_here(torch.device("cpu"), seed=1, ranks=1, digests={})
    others = [own.model_copy(update={"ranks": 8}), own.model_copy(update={"device": "npu"})]
    alike = [None, own, own.model_copy(update={"ranks": None})]

    make_evaluator(*(make_result(stage_seconds={"render": 100.0}, provenance=one) for one in others))
    for one in alike:
        make_evaluator(make_result(stage_seconds={"render": 100.0}, provenance=one))

    assert [dog.limit_s("render") for dog in Dog.made] == [14_400.0, 1000.0, 1000.0, 1000.0]


def test_a_hang_is_written_against_the_trial_in_hand_and_not_against_a_finished_one(make_evaluator, monkeypatch):
    ended = []
    monkeypatch.setattr("search.evaluating.end_hung_process", lambda folder, *what: ended.append(what))
    evaluator = make_evaluator()
    trial = optuna.create_study().ask()

    def hang(trial):
        Dog.made[0].give_up("stage render hung")
        raise optuna.TrialPruned

    monkeypatch.setattr(evaluator, "_evaluated", hang)
    with pytest.raises(optuna.TrialPruned):
        evaluator.objective(trial)
    Dog.made[0].give_up("stage profile hung")
    evaluator.stages_again(7)
    Dog.made[-1].give_up("stage render hung")

    assert ended == [
        (0, "stage render hung"),
        (None, "stage profile hung"),
        (None, "measuring trial 7 again: stage render hung"),
    ]
