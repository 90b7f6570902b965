"""Devices, cores, environment and logs of slots; what a slot holds is held against other studies of this host."""

import itertools
import os
import re
import socket
import time
from functools import partial

import pytest
from pydantic import ValidationError

import search.slots
from hyquant.devices.cuda import CudaDevice
from hyquant.devices.npu import NpuDevice
from search.claims import NPU_DEFAULTS, Claim, claimed
from search.device_cards import cards
from search.errors import SearchError, StoreError
from search.locks import HostLock, default_lock_folder
from search.order import WorkOrder
from search.ports import VARIABLES
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


def test_minus_one_ends_the_visible_devices_and_what_is_no_list_is_refused_with_the_variables_name():
    """CUDA reads a list up to the first index that is none."""
    cuda = CudaDevice()

    assert devices_here(cuda, {"CUDA_VISIBLE_DEVICES": "0, 1,-1,2"}) == ("0", "1")
    assert devices_here(cuda, {"CUDA_VISIBLE_DEVICES": "-1"}) == ()
    for broken in ("0,1,", "0,0", "0;1"):
        with pytest.raises(SearchError, match=f"CUDA_VISIBLE_DEVICES must name different devices.*{broken}"):
            devices_here(cuda, {"CUDA_VISIBLE_DEVICES": broken})


def test_a_claimed_device_is_refused_with_who_holds_it():
    locks = claim_devices(["0", "1"], kind="npu", holder="slot 0 of study first, pid 1")

    with pytest.raises(SearchError, match="npu 1 is held by slot 0 of study first, pid 1"):
        claim_devices(["2", "1"], kind="npu", holder="slot 0 of study second, pid 2")
    claim_devices(["2"], kind="npu", holder="z")[0].release()  # what was claimed before the refusal is free again
    for lock in locks:
        lock.release()
    for lock in claim_devices(["0", "1"], kind="npu", holder="z"):
        lock.release()


def test_names_of_one_card_are_one_claim_and_equal_indices_of_two_cards_are_two(monkeypatch, tmp_path):
    """Two containers with one lock folder, each of which counts its own two cards from 0."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def claim(first_card, *names):
        list_nvidia_cards(tmp_path, range(first_card, first_card + 2))
        known = cards(names, kind="cuda", environment={})
        return claim_devices(names, kind="cuda", cards=known, holder=f"the container of card {first_card}")

    held = [claim(0, "0", "1"), claim(2, "0")]

    for first_card, name in ((0, "GPU-1"), (2, "0"), (1, "1"), (2, f"GPU-2{'a' * 7}")):
        with pytest.raises(SearchError, match=f"cuda {name} is held by the container of card"):
            claim(first_card, name)
    for lock in [*itertools.chain(*held), *claim(2, "GPU-3")]:
        lock.release()


def test_an_index_is_no_card_where_cuda_counts_in_an_order_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    list_nvidia_cards(tmp_path, range(2), models=["H200", "L4"])
    found = partial(cards, ["0", "GPU-1", "MIG-9"], kind="cuda")
    uuids = [f"GPU-{index}{'a' * 7}-0000" for index in range(2)]

    assert found(environment={}) == {"GPU-1": uuids[1]}
    assert found(environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == {"0": uuids[0], "GPU-1": uuids[1]}
    (tmp_path / "nvidia-smi").unlink()
    assert found(environment={}) == {}


def test_ascend_cards_are_those_in_dev(monkeypatch, tmp_path):
    for name in ("davinci6", "davinci10", "davinci_manager", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr("search.device_cards._DEV", tmp_path)

    assert cards(["0", "1", "2"], kind="npu", environment={}) == {"0": "davinci6", "1": "davinci10"}
    assert cards(["0"], kind="cpu", environment={}) == {}


def list_nvidia_cards(folder, numbers, *, models=("H200",)):
    """Put a program into a folder that lists cards as `nvidia-smi -L` does; they are counted from 0."""
    lines = [
        f"GPU {index}: NVIDIA {models[index % len(models)]} (UUID: GPU-{number}{'a' * 7}-0000)"
        for index, number in enumerate(numbers)
    ]
    program = folder / "nvidia-smi"
    program.write_text("\n".join(["#!/bin/sh", '[ "$*" = -L ] || exit 1', *(f"echo '{line}'" for line in lines)]))
    program.chmod(0o755)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_slot_of_npus_gets_no_ports_where_the_user_has_chosen_some(monkeypatch, name):
    """A range of ours would go before a port of the user's."""
    npu = NpuDevice()
    monkeypatch.setattr(NpuDevice, "num_devices", lambda self: 1)
    monkeypatch.setattr("search.claims.resolve_device", lambda device: npu)

    def defaults_of(slot):
        (claim,) = claimed([slot], ORDER, device="npu")
        claim.release()
        return set(claim.defaults)

    assert defaults_of(Slot()) == {*NPU_DEFAULTS, *VARIABLES}
    assert defaults_of(Slot(environment={name: "61000"})) == set(NPU_DEFAULTS)
    monkeypatch.setenv(name, "61000")
    assert defaults_of(Slot()) == set(NPU_DEFAULTS)


def test_ranks_talk_over_loopback_unless_the_user_says_otherwise():
    claim = Claim(Slot(ranks=2))
    loopbacks = [name for _, name in socket.if_nameindex() if name.startswith("lo")]

    assert slot_environment(claim, [claim], environment={}, num_cores=2)["GLOO_SOCKET_IFNAME"] in loopbacks
    user = {"GLOO_SOCKET_IFNAME": "eth7"}
    assert slot_environment(claim, [claim], environment=user, num_cores=2)["GLOO_SOCKET_IFNAME"] == "eth7"


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
        "    meeting = types.SimpleNamespace(register=list, NAME='', LOOPBACK='')\n"
        "    sys.modules.update({'torch': types.ModuleType('torch'), 'torch.distributed': parent})\n"
        "    sys.modules['search.rendezvous'] = meeting\n"
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


def test_the_lock_folder_goes_by_the_number_of_a_user_and_not_by_variables(monkeypatch):
    """After `su` they still hold the name of whoever was there before; in a container there may be no name at all."""
    monkeypatch.setenv("LOGNAME", "alice")
    monkeypatch.setenv("USER", "alice")
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
