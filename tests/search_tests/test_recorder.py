"""What is told about a trial when the disk or MLflow does not take it: nothing that fails the trial."""

import tempfile

import optuna
import pytest

from search.errors import DiskTrouble, StageBug, TrialFailed
from search.order import WorkOrder, mlflow_lock_path, read_state
from search.recorder import Recorder
from search.retry import DISK_TROUBLE


@pytest.fixture
def order(tmp_path) -> WorkOrder:
    return WorkOrder(store=tmp_path, url=None, study="s", slot=0, first_trial=0, deadline=None, until_trial=None)


@pytest.fixture
def study(make_result) -> optuna.Study:
    study = optuna.create_study(directions=["minimize", "minimize"])
    trial = study.ask()
    trial.set_user_attr("result", make_result().model_dump(mode="json"))
    study.tell(trial, [0.1, 0.2])
    return study


def test_a_finished_trial_is_a_sign_of_life(study, order):
    Recorder(study, order, restart_count=4).finish(study.trials[0], None)
    assert read_state(order.folder).restarts_at_last_finish == 4


def test_a_trial_is_finished_without_a_temporary_folder_a_lock_or_a_place_for_the_state(
    study, order, monkeypatch, caplog
):
    monkeypatch.setattr(tempfile, "tempdir", str(order.store / "not there"))
    mlflow_lock_path(order.store).mkdir(parents=True)
    (order.store / "logs").touch()

    recorder = Recorder(study, order, restart_count=4)
    recorder.begin(1)
    recorder.finish(study.trials[0], None)

    said = caplog.text
    assert "a trial's files need a temporary folder" in said
    assert "MLflow's record is completed later: a lock file must be writable" in said
    assert "a slot's state needs room" in said


def test_trials_are_counted_over_restarts_of_the_worker_but_not_what_a_disk_refused(study, order):
    refused = study.ask()
    refused.set_user_attr(DISK_TROUBLE, True)
    study.tell(refused, state=optuna.trial.TrialState.FAIL)
    first = Recorder(study, order, restart_count=0)
    first.finish(study.trials[0], None)
    first.finish(study.trials[1], None)
    second = Recorder(study, order, restart_count=1)
    with pytest.raises(StageBug), second.failures_recorded(study.ask(), lambda: "score"):
        raise IndexError

    assert [first.num_done, second.num_done] == [1, 2]
    assert Recorder(study, order, restart_count=2).num_done == 2
    assert read_state(order.folder).restarts_at_last_finish == 0, "a bug is no sign of life"


@pytest.mark.parametrize(
    ("failure", "is_disk"), [(DiskTrouble("render", "full"), True), (TrialFailed("x", "y"), False)]
)
def test_only_what_a_disk_refused_is_marked_as_no_try(study, order, failure, is_disk):
    trial, recorder = study.ask(), Recorder(study, order, restart_count=0)
    with pytest.raises(TrialFailed), recorder.failures_recorded(trial, lambda: "render"):
        raise failure
    assert (DISK_TROUBLE in trial.user_attrs) is is_disk
    assert trial.user_attrs["reason"] == f"stage {failure.stage}: {failure.reason}"
