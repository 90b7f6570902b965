from datetime import datetime, timedelta

import optuna
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState, create_trial

from search import study_run
from search.repair import agreement, repair
from search.run_log import RunLog
from search.study_run import OtherStudy
from search.tracking import Tracker


@pytest.fixture
def stored(mlflow_store, small_study, make_result):
    """A study of four finished trials, one running and one waiting, and its opened tracker."""
    tracker = Tracker(mlflow_store, "demo")
    tracker.open_study(small_study)
    study = optuna.create_study(study_name="demo", directions=["maximize", "minimize"])
    for quality, ratio in ((0.95, 0.9), (0.9, 0.8)):
        result = make_result(quality=quality, ratio=ratio)
        study.add_trial(create_trial(values=[quality, ratio], user_attrs={"result": result.model_dump(mode="json")}))
    bad = make_result(outcome="infeasible", reason="collapsed is 1, above 0")
    attrs = {"result": bad.model_dump(mode="json")}
    study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs=attrs, constraints={"collapsed": 1.0}))
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"stage": "render", "reason": "out of memory"}))
    study.ask()
    study.enqueue_trial({})
    return study, tracker, mlflow_store


def log_everything(study, tracker):
    from search.trials import trial_reason, trial_result, trial_state

    for trial in study.get_trials()[:4]:
        tracker.start_trial(trial.number)
        tracker.finish_trial(trial.number, trial_state(trial), trial_result(trial), reason=trial_reason(trial))


def test_a_study_that_was_logged_as_it_happened_agrees(stored):
    study, tracker, store = stored
    log_everything(study, tracker)

    assert agreement(store, study) == ()
    assert repair(store, study) == ((), ())


def test_trials_that_never_reached_mlflow_are_logged_by_repair(stored):
    study, tracker, store = stored
    found = repair(store, study)

    assert found.corrected == tuple(f"trial {number} has no MLflow run" for number in range(4))
    assert agreement(store, study) == ()
    assert [(r.number, r.status, r.state) for r in sorted(tracker.trial_runs(), key=lambda r: r.number)] == [
        (0, "FINISHED", "complete"),
        (1, "FINISHED", "complete"),
        (2, "FINISHED", "infeasible"),
        (3, "FAILED", "failed"),
    ]


def test_a_run_left_running_by_a_killed_worker_gets_the_right_status(stored):
    study, tracker, store = stored
    log_everything(study, tracker)
    for run in tracker.trial_runs():
        if run.number == 3:
            tracker.delete_run(run.run_id)
    tracker.start_trial(3)

    assert agreement(store, study) == ("trial 3 is failed in Optuna, but RUNNING with state running in MLflow",)
    repair(store, study)
    assert agreement(store, study) == ()


def test_a_run_that_claims_what_optuna_never_heard_is_corrected(stored, make_result):
    study, tracker, store = stored
    log_everything(study, tracker)
    for run in tracker.trial_runs():
        if run.number == 3:
            tracker.delete_run(run.run_id)
    tracker.finish_trial(3, "complete", None)
    repair(store, study)

    assert agreement(store, study) == ()


def test_of_two_runs_of_one_trial_the_right_one_stays(stored):
    study, tracker, store = stored
    log_everything(study, tracker)
    right = next(run.run_id for run in tracker.trial_runs() if run.number == 0)
    tracker.start_trial(0)

    assert agreement(store, study) == ("trial 0 has 2 MLflow runs instead of one",)
    repair(store, study)
    assert [run.run_id for run in tracker.trial_runs() if run.number == 0] == [right]
    assert agreement(store, study) == ()


def test_a_run_without_a_trial_is_taken_out(stored):
    study, tracker, store = stored
    log_everything(study, tracker)
    tracker.finish_trial(99, "complete", None)

    assert repair(store, study).corrected == ("trial 99 is in MLflow but not in Optuna",)
    assert agreement(store, study) == ()


def test_a_different_number_is_noticed(stored, make_result):
    study, tracker, store = stored
    log_everything(study, tracker)
    tracker.finish_trial(0, "complete", make_result(quality=0.97, ratio=0.9))

    assert agreement(store, study) == ("trial 0 has clip_reference_mean 0.95 in Optuna, but 0.97 in MLflow",)


def client_of(store):
    return MlflowClient(f"sqlite:///{store}/mlflow.db")


def runs_in(store, experiment="demo"):
    """Return what MLflow itself shows of an experiment: its runs that are not deleted, with all they hold."""
    client = client_of(store)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {run.info.run_id: run.to_dictionary() for run in found}


def named_demo(study_id, results=()):
    study = optuna.create_study(study_name="demo", directions=["maximize", "minimize"])
    if study_id is not None:
        study.set_user_attr("study_id", study_id)
    for result in results:
        study.add_trial(create_trial(values=result.values, user_attrs={"result": result.model_dump(mode="json")}))
    return study


@pytest.mark.parametrize(("first_id", "second_id"), [("one", "two"), (None, "two"), ("one", None)])
def test_of_two_studies_of_one_name_the_second_leaves_the_runs_of_the_first_alone(
    mlflow_store, small_study, make_result, first_id, second_id
):
    result = make_result()
    first, second = named_demo(first_id, [result] * 3), named_demo(second_id)
    Tracker.of(mlflow_store, first).open_study(small_study)
    repair(mlflow_store, first)
    before = runs_in(mlflow_store)
    later = Tracker.of(mlflow_store, second)
    for refused in (lambda: repair(mlflow_store, second), lambda: later.open_study(small_study), later.trial_runs):
        with pytest.raises(OtherStudy, match="rename the experiment"):
            refused()
    later.start_trial(0)
    later.finish_trial(0, "complete", result)
    after = runs_in(mlflow_store)

    assert len(before) == 4
    assert after == before
    assert agreement(mlflow_store, first) == ()

    client = client_of(mlflow_store)
    client.rename_experiment(client.get_experiment_by_name("demo").experiment_id, "demo of before")
    assert Tracker.of(mlflow_store, second).deliver() == 0
    assert runs_in(mlflow_store, "demo of before") == before
    assert {run["data"]["tags"].get("hyq.trial") for run in runs_in(mlflow_store).values()} == {"0", None}


def test_a_run_that_somebody_put_below_the_studys_stays(stored):
    study, tracker, store = stored
    log_everything(study, tracker)
    (experiment,) = client_of(store).search_experiments(filter_string="name = 'demo'")
    tags = {"mlflow.parentRunId": tracker._study_ids().run_id}
    notes = client_of(store).create_run(experiment.experiment_id, tags=tags, run_name="my notes on the front")

    assert repair(store, study) == ((), ())
    assert notes.info.run_id in runs_in(store)


def test_a_run_of_another_config_is_replaced_and_holds_up_no_other_trial(mlflow_store, small_study, make_result):
    """As after an older optuna.db was put back: MLflow refuses to change the params of a run."""
    study = named_demo("one", [make_result(kind) for kind in ("dynamic", "static", "timestep")])
    tracker = Tracker.of(mlflow_store, study)
    tracker.open_study(small_study)
    tracker.finish_trial(0, "complete", make_result("m4"))
    found = repair(mlflow_store, study)
    strategies = {
        run["data"]["tags"]["hyq.trial"]: run["data"]["params"]["strategy"]
        for run in runs_in(mlflow_store).values()
        if "hyq.trial" in run["data"]["tags"]
    }

    assert [sentence.split()[:2] for sentence in found.corrected] == [["trial", str(number)] for number in range(3)]
    assert found.refused == ()
    assert strategies == {"0": "dynamic", "1": "static", "2": "timestep"}
    assert agreement(mlflow_store, study) == ()


def test_a_trial_that_mlflow_refuses_holds_up_no_other(stored):
    study, tracker, store = stored
    tracker.send(RunLog(number=1, params={"strategy": "another"}))
    found = repair(store, study)

    assert found.corrected == tuple(f"trial {number} has no MLflow run" for number in (0, 2, 3))
    assert len(found.refused) == 1
    assert found.refused[0].startswith("trial 1 is complete in Optuna, but RUNNING")
    assert "strategy" in found.refused[0]
    assert "upgrade" not in found.refused[0]
    assert [difference.split()[1] for difference in agreement(store, study)] == ["1"]


def test_a_run_made_between_two_pages_costs_no_other_run(stored, make_result, monkeypatch):
    """MLflow counts pages off by start: a run that began earlier shifts the last one of a page to the next."""
    study, tracker, store = stored
    log_everything(study, tracker)
    result = make_result(quality=0.5)
    for _ in range(2):  # trials 4 and 5, which run and wait, are passed by
        study.add_trial(create_trial(values=result.values, user_attrs={"result": result.model_dump(mode="json")}))
    tracker.finish_trial(6, "complete", result)
    before = runs_in(store)
    monkeypatch.setattr(study_run, "_PAGE", 2)
    early = datetime.now() - timedelta(hours=3)
    search, is_first = MlflowClient.search_runs, [True]

    def search_and_shift(client, *args, **options):
        page = search(client, *args, **options)
        if options.get("order_by") and is_first:
            is_first.clear()
            Tracker(store, "demo").finish_trial(7, "complete", result, span=(early, early))
        return page

    monkeypatch.setattr(MlflowClient, "search_runs", search_and_shift)
    found = repair(store, study)
    monkeypatch.undo()

    assert not any("instead of one" in sentence for sentence in found.corrected)
    assert before.keys() < runs_in(store).keys()
    assert agreement(store, study) == ()
