import optuna
import pytest
from optuna.trial import TrialState, create_trial

from search.repair import agreement, repair
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
    assert repair(store, study) == ()


def test_trials_that_never_reached_mlflow_are_logged_by_repair(stored):
    study, tracker, store = stored
    found = repair(store, study)

    assert found == tuple(f"trial {number} has no MLflow run" for number in range(4))
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

    assert repair(store, study) == ("trial 99 is in MLflow but not in Optuna",)
    assert agreement(store, study) == ()


def test_a_different_number_is_noticed(stored, make_result):
    study, tracker, store = stored
    log_everything(study, tracker)
    tracker.finish_trial(0, "complete", make_result(quality=0.97, ratio=0.9))

    assert agreement(store, study) == ("trial 0 has clip_reference_mean 0.95 in Optuna, but 0.97 in MLflow",)
