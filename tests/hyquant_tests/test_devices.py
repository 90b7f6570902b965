"""Kinds of devices: names, discovery, and what is said when one is not there."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hyquant.devices import DEVICES, resolve_device, resolve_torch_device
from hyquant.errors import ConfigError, DeviceUnavailable


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_says_how_ranks_use_it(name):
    device = DEVICES[name]

    assert device.name == name
    assert device.process_group_backend == {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[name]
    assert isinstance(device.is_available(), bool)


def test_auto_prefers_accelerators_and_always_finds_something():
    assert list(DEVICES) == ["npu", "cuda", "cpu"]
    assert resolve_device("auto").is_available()


@pytest.mark.parametrize("name", [name for name, device in DEVICES.items() if not device.is_available()])
def test_a_device_that_is_not_there_says_what_to_do(name):
    with pytest.raises(DeviceUnavailable, match=rf"device {name} needs .*; .*use device cpu"):
        resolve_device(name)


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_a_missing_torch_npu_is_named():
    with pytest.raises(DeviceUnavailable, match=r"package torch_npu.*pip install"):
        resolve_device("npu:0")


def test_a_torch_npu_that_does_not_load_is_explained(tmp_path, monkeypatch):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)

    with pytest.raises(DeviceUnavailable, match=r"libhccl\.so.*CANN"):
        resolve_device("npu")


def test_npu_calls_go_to_torch_npu(monkeypatch):
    calls = []
    runtime = ModuleType("torch_npu")
    runtime.__spec__ = importlib.util.spec_from_loader("torch_npu", loader=None)
    runtime.npu = ModuleType("torch_npu.npu")
    runtime.npu.is_available = lambda: True
    runtime.npu.synchronize = lambda index: calls.append(("synchronize", index))
    runtime.npu.max_memory_allocated = lambda index: 123
    monkeypatch.setitem(sys.modules, "torch_npu", runtime)

    device = resolve_device("npu")
    device.now_s(2)

    assert calls == [("synchronize", 2)]
    assert device.memory_peak_bytes() == 123
    assert device.visible_devices_env == "ASCEND_RT_VISIBLE_DEVICES"


def test_an_unknown_device_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"npu, cuda, cpu.*got 'cuba'.*did you mean 'cuda'"):
        resolve_device("cuba")


def test_a_malformed_index_is_refused():
    with pytest.raises(ConfigError, match="npu:1"):
        resolve_torch_device("cpu:first")


def test_the_index_is_that_of_the_local_rank_unless_given(monkeypatch):
    seen = []
    cpu = torch.device("cpu")
    monkeypatch.setattr(type(DEVICES["cpu"]), "torch_device", lambda self, index=0: seen.append(index) or cpu)
    monkeypatch.setenv("LOCAL_RANK", "3")
    resolve_torch_device("cpu")
    resolve_torch_device("cpu:1")
    monkeypatch.delenv("LOCAL_RANK")
    resolve_torch_device("cpu")

    assert seen == [3, 1, 0]


@pytest.mark.parametrize(("name", "local_rank"), [("cuda:2", "0"), ("cuda", "2")])
def test_a_device_beyond_those_that_are_there_is_refused(monkeypatch, name, local_rank):
    monkeypatch.setattr(type(DEVICES["cuda"]), "require", lambda self: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", local_rank)

    with pytest.raises(DeviceUnavailable, match="cuda:2 is asked for and 2 are visible; start fewer ranks"):
        resolve_torch_device(name)
    assert resolve_torch_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.slow
def test_whatever_is_quantized_stays_on_its_device():
    """On a stand-in that refuses operations between two devices, in a process of its own."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.hyquant_tests.on_stand_in"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)

    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(lines) == 11
    assert [line for line in lines if not line.endswith(": ok")] == []


def test_cpu_time_and_memory_are_seconds_and_bytes():
    cpu = resolve_device("cpu")
    began = time.monotonic()
    start = cpu.now_s()
    time.sleep(0.02)
    slept_s = cpu.now_s() - start

    assert 0.02 <= slept_s <= time.monotonic() - began
    assert cpu.torch_device(5) == torch.device("cpu")
    assert cpu.memory_peak_bytes() > 50 * 2**20


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_counts_the_memory_of_tensors():
    cuda = resolve_device("cuda")
    cuda.reset_memory_peak()
    before = cuda.memory_peak_bytes()
    torch.empty(2**24, dtype=torch.uint8, device=cuda.torch_device())

    assert cuda.memory_peak_bytes() - before >= 2**24
