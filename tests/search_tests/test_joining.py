"""Joined workers: their names, by which others hand back, blame and sample, and what their exit codes say."""

import os
import signal
from types import SimpleNamespace

import pytest

from search.cli import exit_code_of
from search.joining import _crew
from search.order import SlotState, write_state
from search.slots import RunningSlot


def test_two_workers_of_a_host_have_two_names_also_if_their_stores_differ(tmp_path):
    with (
        _crew(tmp_path / "a", "s") as first,
        _crew(tmp_path / "a", "s") as second,
        _crew(tmp_path / "b", "s") as elsewhere,
    ):
        assert len({first, second, elsewhere}) == 3
    with _crew(tmp_path / "a", "s") as again:
        assert again == first


def test_two_hosts_of_one_name_give_two_names(tmp_path, monkeypatch):
    with _crew(tmp_path, "s") as here:
        pass
    monkeypatch.setattr("search.processes._kernel", lambda: "another boot")
    with _crew(tmp_path, "s") as there:
        assert there != here


@pytest.fixture
def join(stored_store, monkeypatch, capfd):
    """Join the stored study, which is not over, with a slot that fails, is told to leave by a signal, or is done."""

    def call(*options: str, failure: str | None = None, told: signal.Signals | None = None) -> tuple[int, str, str]:
        def start(slots, order, *, device):
            write_state(order.folder, SlotState(stopped=failure))
            left = order.folder / "leave"
            agent = SimpleNamespace(
                returncode=0,
                poll=lambda: None if told is not None and not left.exists() else 0,
                wait=lambda: 0,
            )
            if told is not None:
                os.kill(os.getpid(), told)
            return [RunningSlot(index=0, agent=agent, folder=order.folder)]

        monkeypatch.setattr("search.joining.start_slots", start)
        monkeypatch.setattr("search.joining.stop_slots", lambda slots, *, is_impatient: None)
        code = exit_code_of(["worker", "demo", "--store", str(stored_store), *options])
        return code, *capfd.readouterr()

    return call


@pytest.mark.parametrize("options", [(), ("--once",), ("--trials", "3")], ids=" ".join)
def test_a_slot_that_cannot_work_is_an_error_however_many_trials_were_asked_for(join, options):
    code, _, errors = join(*options, failure="no such weights")

    assert code == 1
    assert errors == "hyq-search: study demo stopped early: no such weights\n"


def test_a_worker_whose_trials_are_done_leaves_with_0(join):
    code, answer, _ = join("--once")

    assert code == 0
    assert "left; the study goes on" in answer


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("options", [(), ("--now",), ("--json",)], ids=" ".join)
def test_a_worker_that_is_asked_to_leave_leaves_with_130_as_the_study_is_not_over(join, told, options):
    code, answer, _ = join(*options, told=told)

    assert code == 130
    assert ("left; the study goes on" in answer) == ("--now" not in options)
