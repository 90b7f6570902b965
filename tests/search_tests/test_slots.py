"""Devices, cores, environment and logs of slots; what a slot holds is held against other studies of this host."""

import os
import re
import time

import pytest
from pydantic import ValidationError

import search.slots
from hyquant.devices.npu import NpuDevice
from search.claims import NPU_DEFAULTS, Claim, claimed
from search.errors import SearchError, StoreError
from search.locks import HostLock, default_lock_folder
from search.order import WorkOrder
from search.slot_devices import assign_devices, claim_devices, devices_here, read_devices, read_layout
from search.slots import keep_short, rank_threads, slot_environment, start_slots, stop_slots
from search.study import Slot

ORDER = WorkOrder(store="s", url=None, study="x", slot=0, first_trial=0, deadline=None, until_trial=None)
EIGHT = tuple("01234567")


@pytest.fixture(autouse=True)
def own_lock_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_device_lists_and_layouts():
    assert read_devices("0-3, 6") == ("0", "1", "2", "3", "6")
    assert read_devices("GPU-8932f937,MIG-1/2") == ("GPU-8932f937", "MIG-1/2")
    assert read_layout("2 x 4") == [{"ranks": 4, "devices": "auto"}] * 2
    for broken in ("", "3-1", "0,0", "0-2,1", "0;1", "1-"):
        with pytest.raises(ValueError, match="different devices"):
            read_devices(broken)
    for broken in ("0 x 2", "2 x", "eight"):
        with pytest.raises(ValueError, match="SLOTS x RANKS"):
            read_layout(broken)


def test_a_slot_has_a_device_for_each_rank_and_loads_no_code_of_its_own():
    with pytest.raises(ValidationError, match="3 ranks share 2"):
        Slot(ranks=3, devices="0-1")
    for name in ("LD_PRELOAD", "PYTHONPATH", "HYQ_WORK_ORDER"):
        with pytest.raises(ValidationError, match="must not set"):
            Slot(environment={name: "x"})


def test_two_slots_of_a_study_share_no_device(small_study):
    slots = [{"devices": "0-3", "ranks": 4}, {"devices": "3,4", "ranks": 1}]
    with pytest.raises(ValidationError, match=r"\['3'\] stand in two"):
        type(small_study).model_validate({**small_study.model_dump(), "slots": slots})


def test_layouts_are_cut_in_order_from_what_is_free():
    layout = [(2, "auto"), (1, "4"), (4, "auto")]

    assert assign_devices(layout, EIGHT, are_cores=False) == [("0", "1"), ("4",), ("2", "3", "5", "6")]
    assert assign_devices([(1, "auto")] * 2, EIGHT, are_cores=True) == [tuple("0123"), tuple("4567")]
    assert assign_devices([(1, None)], (), are_cores=False) == [None]
    with pytest.raises(SearchError, match="need 9 devices, one for each rank, but 8 are free"):
        assign_devices([(3, "auto")] * 3, EIGHT, are_cores=False)
    with pytest.raises(SearchError, match="but name 9"):
        assign_devices([(1, "9")], EIGHT, are_cores=False)


def test_devices_are_those_the_user_left_visible(monkeypatch):
    device = NpuDevice()
    monkeypatch.setattr(NpuDevice, "num_devices", lambda self: 3)

    assert devices_here(device, {}) == ("0", "1", "2")
    assert devices_here(device, {"ASCEND_RT_VISIBLE_DEVICES": "4-5,7"}) == ("4", "5", "7")


def test_a_claimed_device_is_refused_with_who_holds_it():
    locks = claim_devices(["0", "1"], kind="npu", holder="slot 0 of study first, pid 1")

    with pytest.raises(SearchError, match="npu 1 is held by slot 0 of study first, pid 1"):
        claim_devices(["2", "1"], kind="npu", holder="slot 0 of study second, pid 2")
    claim_devices(["2"], kind="npu", holder="z")[0].release()  # what was claimed before the refusal is free again
    for lock in locks:
        lock.release()
    for lock in claim_devices(["0", "1"], kind="npu", holder="z"):
        lock.release()


def test_the_slot_goes_before_the_user_and_the_user_before_defaults():
    claim = Claim(
        Slot(ranks=2, environment={"ALGO": 1, "MINE": "x"}),
        ("4", "5"),
        "ASCEND_RT_VISIBLE_DEVICES",
        {**NPU_DEFAULTS, "HCCL_IF_BASE_PORT": "61000"},
    )
    user = {"TASK_QUEUE_ENABLE": "1", "ASCEND_RT_VISIBLE_DEVICES": "4-7"}
    made = slot_environment(claim, [claim], environment=user, num_cores=8)

    assert made["ASCEND_RT_VISIBLE_DEVICES"] == "4,5"
    assert (made["TASK_QUEUE_ENABLE"], made["ALGO"], made["MINE"]) == ("1", "1", "x")
    assert made["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert (made["HCCL_IF_BASE_PORT"], made["OMP_NUM_THREADS"]) == ("61000", "4")


def test_ranks_share_the_cores_unless_the_user_says_otherwise():
    claims = [Claim(Slot(ranks=2)), Claim(Slot(ranks=1))]
    pinned = Claim(Slot(ranks=2), tuple("0123"))

    assert slot_environment(claims[0], claims, environment={}, num_cores=8)["OMP_NUM_THREADS"] == "2"
    assert slot_environment(pinned, [pinned], environment={}, num_cores=64)["OMP_NUM_THREADS"] == "2"
    user = {"OMP_NUM_THREADS": "5"}
    assert slot_environment(claims[0], claims, environment=user, num_cores=8)["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("slots", "given", "threads"),
    [
        ((Slot(ranks=2), Slot(ranks=1)), None, 2),
        ((Slot(ranks=2, devices="0-3"), Slot()), None, 2),
        ((Slot(ranks=2, devices="auto"),) * 2, None, 2),
        ((Slot(ranks=64),), None, 1),
        ((Slot(environment={"OMP_NUM_THREADS": 3}),), "5", 3),
        ((Slot(),), "5,2", 5),
        ((Slot(),), "all of them", 8),
        ((Slot(devices="0-63"),), None, 8),
    ],
)
def test_a_plan_computes_in_as_many_threads_as_a_rank_will(slots, given, threads, monkeypatch):
    monkeypatch.setattr("search.slots.cores_here", lambda: tuple(range(8)))
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)

    assert rank_threads(slots) == threads


@pytest.mark.multiproc
def test_an_agent_keeps_its_slot_on_its_cores_and_its_claim_ends_with_it(tmp_path, monkeypatch):
    core = str(max(os.sched_getaffinity(0)))
    order = ORDER.model_copy(update={"store": tmp_path})
    # Stands in for torchrun: says where it may run, and lives until it is ended.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'search.agent' in sys.orig_argv:\n"
        "    import os, time, types\n"
        "    def main(arguments):\n"
        "        print('cores', sorted(os.sched_getaffinity(0)), flush=True)\n"
        "        time.sleep(600)\n"
        "    run = types.ModuleType('torch.distributed.run')\n"
        "    run.main = main\n"
        "    run.get_args_parser = lambda: types.SimpleNamespace(format_help=str)\n"
        "    parent = types.ModuleType('torch.distributed')\n"
        "    parent.run = run\n"
        "    sys.modules.update({'torch': types.ModuleType('torch'), 'torch.distributed': parent})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.getcwd()}")
    running = start_slots([Slot(devices=core)], order, device="cpu")
    try:
        log = running[0].folder / "log.txt"
        assert _within(60, lambda: f"cores [{core}]" in log.read_text()), log.read_text()
        with pytest.raises(SearchError, match=rf"cpu {core} is held by slot 0 of study x"):
            claimed([Slot(devices=core)], order, device="cpu")
        os.kill(running[0].agent.pid, 9)
        running[0].agent.wait()
        claimed([Slot(devices=core)], order, device="cpu")[0].release()
    finally:
        stop_slots(running, is_impatient=lambda: True)


def test_when_one_slot_is_refused_none_holds_anything():
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))][:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    other = claim_devices(cores[1:], kind="cpu", holder="other")

    with pytest.raises(SearchError, match="held by other"):
        claimed([Slot(devices=core) for core in cores], ORDER, device="cpu")
    for lock in [*claim_devices(cores[:1], kind="cpu", holder="z"), *other]:
        lock.release()


def test_a_measurement_is_alone_whatever_study_or_slot_it_is_of():
    """Two locks made without a folder, as two studies make them, are one lock."""
    first, second = HostLock(), HostLock()
    with first.measuring():
        assert not second._room.acquire(shared=True, blocking=False)
    with second.computing():
        assert not first._room.acquire(blocking=False)


def test_the_lock_folder_is_this_users_alone(tmp_path):
    folder = default_lock_folder()
    folder.chmod(0o777)

    assert default_lock_folder().stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(StoreError, match="must be a folder of this user"):
        default_lock_folder()


def test_a_user_without_a_name_has_a_lock_folder(monkeypatch):
    """A container may run as a number that is in no list of users."""

    def nameless():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)
    folder = default_lock_folder()

    assert folder.name == f"hyq-search-{os.geteuid()}"
    assert folder.is_dir()


def test_ranks_of_a_slot_do_not_share_the_device_that_an_index_names():
    with pytest.raises(SearchError, match=r"model\.device is 'cuda:1' and a slot has 2 ranks; leave the index out"):
        claimed([Slot(ranks=2)], ORDER, device="cuda:1")


def test_a_long_log_is_put_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(search.slots, "MAX_LOG_BYTES", 10)
    log = tmp_path / "log.txt"
    for text in ("a" * 11, "b" * 11, "c"):
        log.write_text(text)
        keep_short(log)

    assert re.fullmatch("b+", (tmp_path / "log.old.txt").read_text())
    assert log.read_text() == "c"


def _within(seconds, condition):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False
