"""Studies of the tiny model run for real: torchrun slots, ranks over gloo, processes that are killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest
import torch
import yaml
from optuna.trial import TrialState

from hyquant.config import LayerSelection, QuantConfig, W8A8Dynamic
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from hyquant.models import mini
from search.confirmation import confirmations
from search.errors import SearchError
from search.locate import locate_study
from search.locks import HostLock
from search.mlflow_client import prepare_store
from search.objective import run_trial
from search.prepare import prepare_workbench
from search.prompts import load_prompts
from search.repair import agreement
from search.rerun import run_again
from search.resume import HANDED_BACK
from search.retry import HANDED_BACK_FROM
from search.runner import run_point, run_study
from search.slot_devices import cores_here
from search.stages import Stages
from search.storage import open_study
from search.study_file import load_study
from search.trials import count_states, front, is_evaluated, trial_config, trial_result
from tests.toys.faulty import FAULTY, Faults
from tests.toys.tiny_study import TINY_STUDY

pytestmark = [pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(1800)]

OBJECTIVES = [{"metric": name, "direction": "minimize"} for name in ("latent_l2", "weight_bytes")]
"""What no clock has a say in: of the first three presets two at least are on the front."""
PATIENCE_S = 600
"""How long a busy machine may take to start a study, to run some trials, or to end in order."""


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A folder with prompt files and an MLflow database that was migrated once; copying it takes no time."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "calibration.txt").write_text("one red cube\ntwo blue balls\n")
    (folder / "search.txt").write_text("a green cone\na grey ring\nthree white stars turning\na cup\na red boat\n")
    prepare_store(folder / "mlruns")
    return folder


@pytest.fixture
def make_study_file(template, tmp_path, monkeypatch):
    """Write a study file beside its prompts; keyword arguments change the study."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # host locks of its own: other studies must not pause this one
    folder = tmp_path / "study"
    shutil.copytree(template, folder)

    def make(**changes) -> Path:
        path = folder / "study.yaml"
        path.write_text(yaml.safe_dump({**TINY_STUDY, "store": str(folder / "mlruns"), **changes}))
        return path

    return make


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(path: Path, on_event=lambda event: None):
    """Run a study in this process, and return its summary, its trials and what was told on the way."""
    events = []

    def note(event) -> None:
        events.append(event)
        on_event(event)

    summary = run_study(load_study(path), study_file=path, on_event=note)
    return summary, stored(path), [event for event in events if event.message]


def stored(path: Path) -> optuna.Study:
    config = load_study(path)
    return open_study(Path(config.store), config.name)


def assert_sound(path: Path, *, at_least: int, at_most: int) -> None:
    """Nothing lost, nothing twice, nothing left running, and MLflow agrees."""
    study = stored(path)
    numbers = [trial.number for trial in study.trials]
    evaluated = [trial.user_attrs["config_digest"] for trial in study.trials if is_evaluated(trial)]
    assert numbers == list(range(len(numbers)))
    assert len(set(evaluated)) == len(evaluated)
    assert at_least <= len(evaluated) <= at_most
    assert count_states(study)["running"] == 0
    assert agreement(Path(load_study(path).store), study) == ()


def test_a_slot_of_two_ranks_gives_the_scores_of_one_rank(make_study_file, tmp_path, one_thread):
    """Three prompts on two ranks, so the shares differ.

    Clips are rendered one by one and on one thread: float sums over another batch end differently in the last place on
    some CPUs, which flips int8 codes that lie on a rounding edge.
    """
    workload = {**TINY_STUDY["workload"], "settings": {**TINY_STUDY["workload"]["settings"], "batch_size": 1}}
    path = make_study_file(budget={"trials": 3}, slots=[{"ranks": 2}], workload=workload)

    summary, study, _ = run(path)

    assert summary.evaluated == 3
    config = load_study(path)
    prompts = load_prompts(config.workload, path.parent)
    alone = prepare_workbench(
        config,
        prompts,
        group=Group(),
        device=resolve_device("cpu"),
        cache=tmp_path / "cache of one rank",
        lock=HostLock(tmp_path / "locks"),
    )
    for trial in filter(is_evaluated, study.trials):
        two_ranks, one_rank = trial_result(trial), run_trial(alone, trial_config(trial), Stages(Group())).result
        assert two_ranks.weight_bytes == one_rank.weight_bytes
        for name, metric in one_rank.metrics.items():
            assert two_ranks.metrics[name].values == pytest.approx(metric.values, rel=1e-4, abs=1e-4), name


def test_two_slots_share_a_study_without_a_duplicate_or_lost_trial(make_study_file, faults):
    """The first slot waits in its first trial until the second has one, or it might be done with all of them."""
    path = make_study_file(model=FAULTY, budget={"trials": 7}, slots=[{"ranks": 1}, {"ranks": 1}])
    faults.set({"what": "hold", "times": 100})

    def let_go(event) -> None:
        if event.counts.get("running") == 2:
            faults.set()

    summary, study, _ = run(path, let_go)

    slots = {trial.user_attrs["worker"]["slot"] for trial in study.trials if trial.state.is_finished()}
    assert slots == {0, 1}
    assert summary.counts["failed"] == 0
    assert_sound(path, at_least=7, at_most=8)


@pytest.mark.skipif(len(cores_here()) < 2, reason="two slots of their own cores need two cores")
def test_slots_cut_from_the_cores_run_and_a_trial_of_theirs_agrees_when_it_is_run_again(make_study_file):
    path = make_study_file(budget={"trials": 3}, slots="2 x 1")

    summary, study, _ = run(path)

    assert summary.counts["failed"] == 0
    trial = next(filter(is_evaluated, study.trials))
    assert set(trial_result(trial).provenance.digests) == {"model", "prompts", "config", "calibration"}
    again = run_again(locate_study(str(path)), trial.number)
    assert again.agrees, again
    assert_sound(path, at_least=3, at_most=4)


def test_two_ranks_climb_rungs_together_and_measure_the_front_again(make_study_file):
    """Every rank must stop where rank 0 says, or the others would wait for it for ever."""
    path = make_study_file(
        budget={"trials": 4},
        slots=[{"ranks": 2}],
        workload={**TINY_STUDY["workload"], "num_search_prompts": 5},
        constraints=[{"metric": "psnr_db_worst", "min": 60.0}, {"metric": "collapsed", "max": 0.5}],
        confirm={"members": 2},
    )

    summary, study, _ = run(path)

    assert summary.evaluated == 4
    results = [trial_result(trial) for trial in study.trials if is_evaluated(trial)]
    assert any(result.num_prompts == 4 for result in results)  # what int8 makes of the tiny model is below 60 dB
    assert summary.counts["failed"] == 0
    assert confirmations(study).keys() >= {trial.number for trial in front(study)[:2]}
    assert_sound(path, at_least=4, at_most=4)


def test_a_run_killed_while_the_front_is_measured_again_loses_no_member(make_study_file, faults):
    path = make_study_file(
        model=FAULTY, budget={"trials": 3}, objectives=OBJECTIVES, confirm={"members": 8, "seeds": 2}
    )
    faults.set({"what": "hang", "skip": 3 + 1})
    runner = start_runner(path)
    wait_until_struck(faults, runner)
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    before = confirmations(stored(path))

    summary, study, _ = run(path)

    after = confirmations(study)
    assert len(before) == 1
    assert summary.evaluated == 3
    assert {number: after[number] for number in before} == before
    assert after.keys() >= {trial.number for trial in front(study)}
    assert_sound(path, at_least=3, at_most=3)


def start_runner(path: Path) -> subprocess.Popen:
    """Start the command line in a process of its own, as a user does."""
    command = [sys.executable, "-c", "from search.cli import main; main()", "run", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=path.parent)


def wait_until_struck(faults: Faults, runner: subprocess.Popen, place: int = 0) -> None:
    """Wait until a rendering hangs."""
    deadline = time.monotonic() + PATIENCE_S
    while not faults.has_struck(place):
        assert runner.poll() is None, "the runner ended early"
        assert time.monotonic() < deadline, "no rendering began"
        time.sleep(0.05)


def hanging_trial(path: Path, faults: Faults, runner: subprocess.Popen, place: int = 0) -> optuna.trial.FrozenTrial:
    """Wait until a trial hangs in its rendering, so that it is in hand for as long as its worker lives; return it."""
    wait_until_struck(faults, runner, place)
    return [trial for trial in stored(path).trials if trial.state == TrialState.RUNNING][-1]


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} outlived its runner")


def test_a_study_survives_kill_nine_of_its_worker_and_of_its_runner(make_study_file, faults):
    path = make_study_file(model=FAULTY, budget={"trials": 9})
    faults.set({"what": "hang", "skip": 2}, {"what": "hang", "skip": 4})
    runner = start_runner(path)
    first = hanging_trial(path, faults, runner)
    os.kill(first.user_attrs["worker"]["pid"], signal.SIGKILL)
    second = hanging_trial(path, faults, runner, place=1)
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    wait_until_gone(second.user_attrs["worker"]["pid"])

    summary, study, events = run(path)

    assert {study.trials[trial.number].state for trial in (first, second)} == {TrialState.FAIL}
    assert events[0].kind == "resumed"
    assert summary.evaluated >= 9
    assert_sound(path, at_least=9, at_most=9)


def test_a_study_survives_kill_nine_of_all_its_processes_at_once(make_study_file, faults):
    path = make_study_file(model=FAULTY, budget={"trials": 6}, slots=[{"ranks": 2}])
    faults.set({"what": "hang", "skip": 2})
    runner = start_runner(path)
    running = hanging_trial(path, faults, runner)
    family = psutil.Process(runner.pid).children(recursive=True)
    assert len(family) >= 3  # an agent and two ranks
    for process in (psutil.Process(runner.pid), *family):
        process.suspend()  # so that nobody sees another one die
    for process in (*family, psutil.Process(runner.pid)):
        process.kill()
    runner.wait()
    wait_until_gone(running.user_attrs["worker"]["pid"])
    before = {trial.number for trial in stored(path).trials if is_evaluated(trial)}

    summary, study, _ = run(path)

    assert len(before) == 2
    assert study.trials[running.number].state == TrialState.FAIL
    assert before <= {trial.number for trial in study.trials if is_evaluated(trial)}
    assert summary.evaluated == 6
    assert_sound(path, at_least=6, at_most=6)


def test_a_cache_whose_every_file_is_damaged_is_built_again_with_equal_results(make_study_file, tmp_path, one_thread):
    path = make_study_file(budget={"trials": 2})
    run(path)
    files = [file for file in (path.parent / "mlruns" / "cache").rglob("*") if file.is_file()]
    damaged = {file: flipped(file.read_bytes()) for file in files}
    for file, payload in damaged.items():
        file.chmod(0o640)
        file.write_bytes(payload)

    _, study, _ = run(make_study_file(budget={"trials": 4}))

    assert len(damaged) > 5
    config = load_study(path)
    alone = prepare_workbench(
        config,
        load_prompts(config.workload, path.parent),
        group=Group(),
        device=resolve_device("cpu"),
        cache=tmp_path / "a cache of its own",
        lock=HostLock(tmp_path / "locks"),
    )
    for trial in filter(is_evaluated, study.trials):
        fresh = run_trial(alone, trial_config(trial), Stages(Group())).result
        assert trial_result(trial).metrics == fresh.metrics
    assert_sound(path, at_least=4, at_most=4)


def flipped(payload: bytes) -> bytes:
    """Return bytes of which the middle one is another."""
    middle = len(payload) // 2
    return payload[:middle] + bytes([payload[middle] ^ 0xFF]) + payload[middle + 1 :]


def test_ctrl_c_stops_the_run_gracefully_and_the_running_trial_is_queued_again(make_study_file, faults):
    path = make_study_file(model=FAULTY, budget={"trials": 50})
    faults.set({"what": "hang", "skip": 1})
    runner = start_runner(path)
    running = hanging_trial(path, faults, runner)
    runner.send_signal(signal.SIGINT)

    assert runner.wait(PATIENCE_S) == 130
    wait_until_gone(running.user_attrs["worker"]["pid"])
    study = stored(path)
    (again,) = (trial for trial in study.trials if trial.system_attrs.get(HANDED_BACK_FROM) == running.number)
    assert study.trials[running.number].state == TrialState.FAIL
    assert study.trials[running.number].user_attrs["reason"] == HANDED_BACK
    assert again.state == TrialState.WAITING
    assert count_states(study)["running"] == 0
    assert agreement(path.parent / "mlruns", study) == ()


def test_a_hand_written_point_is_run_and_logged_like_the_rest(make_study_file):
    path = make_study_file()
    point = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(include=("*img_mlp*",)))

    number = run_point(load_study(path), point, study_file=path, on_event=lambda event: None)

    (trial,) = stored(path).trials
    assert trial.number == number
    assert trial_config(trial) == point
    assert_sound(path, at_least=1, at_most=1)
    summary, _, events = run(make_study_file(budget={"trials": 1}))
    assert summary.message == "the budget of 1 evaluated trials was already used"
    assert events[0].message == "resumed study tiny-study with 1 of 1 trials evaluated"


def test_damaged_weights_stop_the_run_with_one_sentence_and_nothing_is_left_running(make_study_file, tmp_path):
    weights = shutil.copytree(mini.WEIGHTS, tmp_path / "weights")
    for file in (weights / "transformer").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    path = make_study_file(model={"kind": "hunyuan_video", "source": str(weights), "device": "cpu"})

    with pytest.raises(SearchError, match=r"stopped early: stage load on rank 0: .*weights"):
        run(path)

    assert count_states(stored(path))["running"] == 0
