"""What the runner decides before it starts a process."""

import os
import signal
import subprocess
import sys

import pytest

from search.errors import SearchError, StoreError, StudyMismatch
from search.interrupts import counted_interrupts
from search.locks import FileLock
from search.mlflow_client import connect
from search.order import MAX_DEATHS_IN_A_ROW, ORDER_VARIABLE, WorkOrder, read_state, slot_folder
from search.parent import AGENT_VARIABLE
from search.prompts import load_prompts
from search.repair import agreement
from search.runner import run_study
from search.slots import agent_command
from search.spool import Spool
from search.storage import create_study, require_space, stored_config, study_id
from search.study import Budget, JudgeConfig, Slot
from search.study_run import find_study_run
from search.tracking import Tracker
from search.trials import count_states
from tests.toys.mlflow_server import mlflow_server


@pytest.fixture
def prepared(mlflow_store, study_config, make_result):
    """A study file's place with prompts, its config, and the stored study with its budget of one trial used."""
    tmp_path = mlflow_store.parent
    (tmp_path / "calibration.txt").write_text("a\nb\n")
    (tmp_path / "search.txt").write_text("c\nd\n")
    config = study_config.model_copy(update={"store": str(tmp_path / "mlruns"), "budget": Budget(trials=1)})
    prompts = load_prompts(config.workload, tmp_path)
    study, _ = create_study(tmp_path / "mlruns", config, prompts)

    def one(trial):
        result = make_result()
        trial.set_user_attr("config", result.config.model_dump(mode="json"))
        trial.set_user_attr("config_digest", result.config_digest)
        trial.set_user_attr("result", result.model_dump(mode="json"))
        return result.values

    study.optimize(one, n_trials=1)
    return tmp_path / "study.yaml", config, study


def run(path, config):
    events = []
    return run_study(config, study_file=path, on_event=events.append), events


def test_a_study_whose_budget_is_used_starts_no_process_but_makes_mlflow_agree(prepared):
    path, config, study = prepared

    summary, events = run(path, config)

    assert summary.evaluated == 1
    assert "already used" in summary.message
    assert events[0].message == "resumed study tiny-study with 1 of 1 trials evaluated"
    assert events[1].message == f"queued the {len(config.space.presets)} presets of space mini"
    assert count_states(study)["waiting"] == len(config.space.presets)
    store = path.parent / "mlruns"
    assert agreement(store, study) == ()
    client = connect(store, None)
    parent = find_study_run(client, config.name, study_id(study))
    assert client.get_run(parent.run_id).info.status == "FINISHED"
    assert {"study.yaml", "front.html"} <= {file.path for file in client.list_artifacts(parent.run_id)}


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_run_outlives_an_mlflow_server_that_is_away_and_the_next_one_completes_its_record(prepared, tmp_path):
    path, config, study = prepared
    (folder := tmp_path / "server").mkdir()
    server = mlflow_server(folder)
    config = config.model_copy(update={"tracking": server.url})

    summary, events = run(path, config)
    server.start()
    run(path, config)
    found = agreement(path.parent / "mlruns", study, server.url)
    server.kill()

    assert summary.evaluated == 1
    assert "Its MLflow record is completed later" in " ".join(event.message for event in events)
    assert found == ()


@pytest.mark.parametrize("is_server", [False, True])
def test_a_run_whose_name_is_anothers_in_mlflow_is_refused(prepared, mlflow_store, tmp_path, is_server):
    path, config, _ = prepared
    address = f"sqlite:///{mlflow_store}/mlflow.db"
    Tracker(mlflow_store, config.name).finish_trial(0, "complete", None)  # of a study without an id
    before = {run.run_id for run in Tracker(mlflow_store, config.name).trial_runs()}

    with pytest.raises(StoreError, match=r"is of another study of this name .* rename the experiment"):
        run(path, config.model_copy(update={"tracking": address if is_server else None}))
    assert {run.run_id for run in Tracker(mlflow_store, config.name).trial_runs()} == before
    assert list(Spool(mlflow_store, config.name).waiting()) == []


def test_a_study_is_resumed_by_name_with_its_stored_prompts(prepared):
    path, config, _ = prepared
    (path.parent / "search.txt").unlink()

    summary, _ = run(None, config)

    assert summary.evaluated == 1


def test_a_second_runner_of_one_study_is_refused(prepared):
    path, config, _ = prepared
    lock = FileLock(path.parent / "mlruns" / "locks" / "tiny-study.runner.lock")

    with lock.held(), pytest.raises(SearchError, match="one runner at a time"):
        run(path, config)


def test_a_changed_study_file_is_refused_with_the_difference(prepared):
    path, config, _ = prepared
    changed = config.model_copy(update={"judge": JudgeConfig(model="hashing", view="grid")})

    with pytest.raises(StudyMismatch, match=r"judge.view: stored 'frames', file 'grid'"):
        run(path, changed)


def test_changed_slots_and_budget_are_taken_over(prepared):
    path, config, study = prepared
    changed = config.model_copy(update={"slots": (Slot(ranks=2),), "budget": Budget(trials=1, time_s=9.0)})

    run(path, changed)

    assert stored_config(study) == changed.without_places()


def test_slots_are_told_which_presets_were_queued_before_they_started(prepared, monkeypatch):
    path, config, _ = prepared
    orders = []

    def start_slots(slots, order, *, device):
        orders.append(order)
        raise SearchError("no devices")

    monkeypatch.setattr("search.runner.start_slots", start_slots)
    with pytest.raises(SearchError, match="no devices"):
        run(path, config.model_copy(update={"budget": Budget(trials=2)}))

    (order,) = orders
    num_presets = len(config.space.presets)
    assert order.first_trial == 1 + num_presets
    assert order.unfinished == tuple(range(1, 1 + num_presets))


def test_slots_that_cannot_start_are_the_only_trouble_that_a_new_study_tells_of(study_config, tmp_path):
    for name in ("calibration.txt", "search.txt"):
        (tmp_path / name).write_text(f"{name} a\n{name} b\n")
    slots = (Slot(ranks=10_000, devices="auto"),)
    config = study_config.model_copy(update={"store": str(tmp_path / "mlruns"), "slots": slots})
    events = []

    with pytest.raises(SearchError, match="slots need 10000 devices"):
        run_study(config, study_file=tmp_path / "study.yaml", on_event=events.append)

    assert not [event.message for event in events if "mlflow" in event.message.lower()]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("search.storage.MIN_FREE_BYTES", 2**62)

    with pytest.raises(StoreError, match="MiB of free space"):
        require_space(tmp_path)


ORDER = WorkOrder(store="s", url=None, study="x", slot=2, first_trial=0, deadline=None, until_trial=None)


def test_an_agent_starts_its_ranks():
    command = agent_command(Slot(ranks=3), ORDER, runner_pid=os.getpid())

    assert "--nproc-per-node=3" in command
    assert command[-1] == "search.worker"


def test_ctrl_c_is_counted_and_heard_between_steps():
    with counted_interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

        assert interrupts.count == 2
        with pytest.raises(KeyboardInterrupt):
            interrupts.wait(60)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.multiproc
def test_a_slot_whose_worker_keeps_dying_stops_and_says_so(tmp_path):
    """Torchrun restarted it three times since a trial finished; it must not even load the model again."""
    order = ORDER.model_copy(update={"store": tmp_path})
    restarts = {"TORCHELASTIC_RESTART_COUNT": str(MAX_DEATHS_IN_A_ROW)}
    environment = os.environ | restarts | {ORDER_VARIABLE: order.model_dump_json()}

    command = [sys.executable, "-m", "search.worker"]
    finished = subprocess.run(command, env=environment, capture_output=True, timeout=240)

    assert finished.returncode == 0
    assert "died 3 times in a row" in read_state(slot_folder(tmp_path, "x", 2)).stopped


@pytest.mark.multiproc
def test_one_rank_of_several_stops_its_slot_by_way_of_the_next_start(tmp_path):
    """Ended well, it would leave the others waiting for it; its first word is what counts."""
    order = ORDER.model_copy(update={"store": tmp_path})
    restarts = {"TORCHELASTIC_RESTART_COUNT": str(MAX_DEATHS_IN_A_ROW), "RANK": "1", "WORLD_SIZE": "2"}
    environment = os.environ | restarts | {ORDER_VARIABLE: order.model_dump_json()}
    command = [sys.executable, "-m", "search.worker"]

    codes = [subprocess.run(command, env=environment, timeout=240).returncode for _ in range(2)]

    assert codes == [1, 0]
    assert "died 3 times in a row" in read_state(order.folder).stopped


@pytest.mark.multiproc
def test_a_rank_whose_agent_is_gone_before_it_looks_ends_at_once(tmp_path):
    order = ORDER.model_copy(update={"store": tmp_path})
    restarts = {"TORCHELASTIC_RESTART_COUNT": str(MAX_DEATHS_IN_A_ROW), "RANK": "0"}
    environment = os.environ | restarts | {ORDER_VARIABLE: order.model_dump_json(), AGENT_VARIABLE: "1"}

    finished = subprocess.run([sys.executable, "-m", "search.worker"], env=environment, timeout=240)

    assert finished.returncode == 1
