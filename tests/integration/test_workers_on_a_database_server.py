"""A run and joined workers on a real PostgreSQL server that is stopped, or killed with everything else."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from optuna.trial import TrialState

from search.confirming import pending
from search.earlier import FINGERPRINT
from search.mlflow_client import prepare_store
from search.repair import agreement
from search.resume import HANDED_BACK
from search.retry import MAX_RETRIES, queued_again
from search.storage import open_study, stored_config
from search.trials import count_states, is_evaluated
from tests.toys.faulty import FAULTY
from tests.toys.servers import Cable, postgres
from tests.toys.tiny_study import TINY_STUDY

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("initdb") is None, reason="initdb (PostgreSQL) is not installed"),
]

STUDY = {
    **TINY_STUDY,
    "model": FAULTY,
    "workload": {
        **TINY_STUDY["workload"],
        "num_calibration_prompts": 1,
        "num_search_prompts": 4,
        "settings": {"height": 16, "width": 16, "num_frames": 5, "num_steps": 2},
    },
    "confirm": {"members": 2},
    "budget": {"trials": 14},
}
PATIENCE_S = 600


class Site:
    """A study on a database server, and hosts that work on it: each has a store of its own."""

    def __init__(self, folder: Path, server, faults):
        self.folder, self.server, self.faults, self.started = folder, server, faults, []
        (folder / "calibration.txt").write_text("one red cube\n")
        (folder / "search.txt").write_text("".join(f"a green cone on {count} cubes\n" for count in range(6)))
        (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, "store": str(folder / "owner")}))
        prepare_store(folder / "owner")

    def start(self, *arguments, store, url=None, before="pass"):
        """Start a command; `before` is done in its process first."""
        command = [sys.executable, "-c", f"{before}; from search.cli import main; main()", *arguments]
        command += ["--store", str(self.folder / store)]
        address = url or self.server.url
        environment = os.environ | {"HYQ_STORAGE": address, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)}
        with (self.folder / f"log-{len(self.started)}.txt").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def run(self, before="pass"):
        return self.start("run", str(self.folder / "study.yaml"), store="owner", before=before)

    def join(self, store, *options, url=None):
        return self.start("worker", "tiny-study", *options, store=store, url=url)

    def hold(self, *, skip=0):
        """Let trials begin, but none be rendered after so many, until they are let go."""
        self.faults.set({"what": "hold", "skip": skip, "times": 1000})

    def let_go(self):
        self.faults.set()

    def interrupt_after(self, num_trials):
        """Let a run evaluate so many trials and be interrupted; what it leaves behind is a study to join."""
        owner = self.run()
        self.wait_for(lambda trials: num_evaluated(trials) >= num_trials, owner)
        owner.send_signal(signal.SIGINT)
        assert owner.wait(PATIENCE_S) == 130

    def study(self):
        return open_study(self.folder / "owner", "tiny-study", url=self.server.url)

    def wait_for(self, condition, process):
        """Wait until a condition on the study's trials holds, at the latest when a process has ended.

        The study may not exist yet.
        """
        deadline, has_ended = time.monotonic() + PATIENCE_S, False
        while time.monotonic() < deadline and not has_ended:
            has_ended = process.poll() is not None
            if "study" in self.log(process) and condition(self.study().trials):
                return
            time.sleep(0.2)
        raise AssertionError(self.log(process))

    def wait_for_word(self, word, process):
        """Wait until a process has said something."""
        deadline = time.monotonic() + PATIENCE_S
        while word not in self.log(process):
            assert process.poll() is None, self.log(process)
            assert time.monotonic() < deadline, self.log(process)
            time.sleep(0.2)

    def log(self, process):
        return (self.folder / f"log-{self.started.index(process)}.txt").read_text()

    def assert_sound(self):
        """Every trial is in a final state, nothing was lost or evaluated twice, and MLflow agrees."""
        study = self.study()
        evaluated = [trial.user_attrs["config_digest"] for trial in study.trials if is_evaluated(trial)]
        assert [trial.number for trial in study.trials] == list(range(len(study.trials)))
        assert len(evaluated) == len(set(evaluated)) == STUDY["budget"]["trials"]
        assert count_states(study)["running"] == 0
        assert pending(study, stored_config(study)) == []
        assert agreement(self.folder / "owner", study) == ()
        return study

    def end(self):
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def site(tmp_path, faults):
    with postgres() as server:
        site = Site(tmp_path, server, faults)
        yield site
        site.end()


def num_evaluated(trials):
    return sum(map(is_evaluated, trials))


def lost(study):
    return [t.number for t in study.trials if t.state == TrialState.FAIL and "reason" not in t.user_attrs]


def test_a_server_that_is_away_for_a_while_costs_no_trial(site):
    """The owner and both workers have a trial in hand when the server stops, and finish it while there is none."""
    site.hold(skip=3)
    owner = site.run()
    site.wait_for(lambda trials: len(trials) > 0, owner)
    workers = [site.join(f"host{index}") for index in range(2)]
    site.wait_for(lambda trials: len(all_in_hand(trials)) == 3 and num_evaluated(trials) == 3, owner)

    site.server.stop()
    site.let_go()
    time.sleep(12)
    site.server.start()

    assert [process.wait(PATIENCE_S) for process in (owner, *workers)] == [0, 0, 0], site.log(owner)
    study = site.assert_sound()
    assert lost(study) == []
    assert all("secret" not in path.read_text() for path in site.folder.rglob("*.txt"))
    assert "secret" not in str(study.user_attrs)


def test_after_everything_was_killed_at_once_the_run_goes_on(site):
    site.hold(skip=3)
    owner = site.run()
    site.wait_for(lambda trials: len(trials) > 0, owner)
    worker = site.join("host")
    site.wait_for(lambda trials: len(all_in_hand(trials)) == 2 and num_evaluated(trials) == 3, owner)
    before = {trial.number: trial.values for trial in site.study().trials if trial.state == TrialState.COMPLETE}

    for process in (owner, worker):
        process.kill()
    site.server.kill()
    site.let_go()
    site.server.start()
    again = site.run()

    assert again.wait(PATIENCE_S) == 0, site.log(again)
    study = site.assert_sound()
    assert before == {number: study.trials[number].values for number in before}


def connections(process, port):
    """Return how many connections to a server the processes of a command hold, by rank; None is the command itself."""
    command = psutil.Process(process.pid)
    ranks = {command: None} | {
        child: int(rank) for child in command.children(recursive=True) if (rank := child.environ().get("RANK"))
    }
    held = dict.fromkeys(ranks.values(), 0)
    for one, rank in ranks.items():
        held[rank] += sum(bool(end.raddr) and end.raddr.port == port for end in one.net_connections("tcp"))
    return held


def test_a_worker_leaves_after_its_trial_or_hands_it_back(site):
    """In passing: rank 0 alone needs the database, and PostgreSQL has 100 connections by default."""
    site.interrupt_after(1)
    assert lost(site.study()) == []
    site.hold()
    calm, hasty = site.join("calm", "--slots", "1 x 2"), site.join("hasty", "--now")
    site.wait_for(lambda trials: len(in_hand(trials)) == 2, calm)
    both = in_hand(site.study().trials)
    held = connections(calm, site.server.port)
    assert held.keys() == {None, 0, 1}
    assert held[None] == 1
    assert held[0] in (1, 2)
    assert held[1] == 0

    calm.terminate()
    hasty.terminate()
    site.wait_for_word("finishing the trials in hand", calm)
    assert hasty.wait(PATIENCE_S) == 130
    site.let_go()

    assert calm.wait(PATIENCE_S) == 130
    assert "left; the study goes on" in site.log(calm)
    study = site.study()
    assert count_states(study)["running"] == 0
    assert lost(study) == []
    finished = {number for number in both if is_evaluated(study.trials[number])}
    handed_back = {number for number in both if study.trials[number].user_attrs.get("reason") == HANDED_BACK}
    assert len(finished) == len(handed_back) == 1
    assert handed_back <= queued_again(study.trials)


def all_in_hand(trials):
    """Return the trials that somebody has in hand."""
    return [trial for trial in trials if trial.state == TrialState.RUNNING and "worker" in trial.user_attrs]


def in_hand(trials):
    """Return the numbers of trials that a joined worker has in hand."""
    return {trial.number for trial in all_in_hand(trials) if trial.user_attrs["worker"]["crew"]}


def test_a_worker_that_is_cut_off_for_longer_than_its_lease_drops_its_trial_and_goes_on(site):
    cable = Cable(site.server.port)
    far = site.server.url.replace(str(site.server.port), str(cable.port))
    site.interrupt_after(1)
    site.hold()
    worker = site.join("far", url=far)
    site.wait_for(lambda trials: in_hand(trials) and site.faults.has_struck(), worker)
    cable.cut()
    cut_off = in_hand(site.study().trials)
    site.let_go()
    owner = site.run(before="import search.lease; search.lease.GRACE_S = 12.0")
    site.wait_for(lambda trials: all(trials[number].state == TrialState.FAIL for number in cut_off), owner)
    cable.mend()

    assert [process.wait(PATIENCE_S) for process in (owner, worker)] == [0, 0], site.log(owner) + site.log(worker)
    study = site.assert_sound()
    assert cut_off <= set(lost(study))
    logs = "".join(path.read_text() for path in (site.folder / "far" / "logs").rglob("log.txt"))
    assert all(f"trial {number} was taken back while this worker was cut off" in logs for number in cut_off)
    cable.close()


def test_a_worker_with_other_weights_is_refused_and_one_without_a_record_is_told(site):
    site.interrupt_after(1)
    study = site.study()
    before = len(study.trials)
    study.set_user_attr(FINGERPRINT, "other-weights")

    other = site.join("other")

    assert other.wait(PATIENCE_S) == 1
    assert "is about model other-weights" in site.log(other)
    assert "no MLflow is known here" in site.log(other)
    assert len(site.study().trials) == before


def test_interrupting_a_run_again_and_again_loses_no_trial(site):
    """Were an interruption an attempt that failed, a trial would be given up after the third.

    The first one certainly has a trial in hand, the others come whenever they come.
    """
    site.faults.set({"what": "hang"})
    for _ in range(MAX_RETRIES + 1):
        owner = site.run()
        site.wait_for(lambda trials: any("worker" in t.user_attrs and not t.state.is_finished() for t in trials), owner)
        owner.send_signal(signal.SIGINT)
        assert owner.wait(PATIENCE_S) == 130

    study = site.study()
    handed_back = {trial.number for trial in study.trials if trial.user_attrs.get("reason") == HANDED_BACK}
    assert handed_back
    assert handed_back <= queued_again(study.trials)
    assert lost(study) == []
    assert all("retry_history" not in trial.system_attrs for trial in study.trials)
