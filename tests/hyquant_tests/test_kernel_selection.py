import json

import pytest
import torch

from hyquant.errors import ConfigError
from hyquant.kernels import KERNELS, selection, x86_build
from hyquant.kernels.reference import REFERENCE
from hyquant.kernels.selection import FORCED, LinearShape, candidates, kernel_for, kernel_times, kind_on
from hyquant.modules.linear import quant_linears

CPU = torch.device("cpu")
SHAPE = LinearShape(num_outputs=24, num_inputs=16, num_rows=8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give each test an empty cache and no forced kernel; what is built stays loaded."""
    for kernel in KERNELS.values():
        kernel.is_available(CPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(FORCED, raising=False)
    return tmp_path / "hyquant"


@pytest.fixture
def two_kernels(monkeypatch):
    """Offer two candidates, whatever this machine has."""
    pair = (REFERENCE, KERNELS["int_mm"])
    monkeypatch.setattr(selection, "candidates", lambda device: pair)
    return pair


def times_file(cache):
    (path,) = cache.glob("kernels-*.json")
    return path


def test_every_candidate_is_timed_once_and_the_times_are_kept(cache, two_kernels):
    first = kernel_times(CPU, SHAPE)

    assert first.keys() == {"reference", "int_mm"}
    assert all(seconds > 0 for seconds in first.values())
    assert kernel_times(CPU, SHAPE) == first
    assert json.loads(times_file(cache).read_text()) == {"8x16->24": first}


def test_the_fastest_of_the_kept_times_is_chosen(cache, two_kernels):
    kernel_times(CPU, SHAPE)
    path = times_file(cache)

    for fastest, other in [("reference", "int_mm"), ("int_mm", "reference")]:
        path.write_text(json.dumps({"8x16->24": {fastest: 1e-6, other: 2e-6}}))
        assert kernel_for(CPU, SHAPE) is KERNELS[fastest]


def test_without_a_home_times_are_measured_and_not_kept(cache, two_kernels, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", homeless)

    assert kernel_times(CPU, SHAPE).keys() == {"reference", "int_mm"}


def test_a_damaged_cache_is_measured_again(cache, two_kernels):
    kernel_times(CPU, SHAPE)
    times_file(cache).write_text("{")

    assert kernel_times(CPU, SHAPE).keys() == {"reference", "int_mm"}


def test_a_single_candidate_is_not_timed(cache, monkeypatch):
    monkeypatch.setattr(selection, "candidates", lambda device: (REFERENCE,))

    assert kernel_for(CPU, SHAPE) is REFERENCE
    assert not cache.exists()


def test_a_forced_kernel_runs_every_layer(monkeypatch):
    monkeypatch.setenv(FORCED, "reference")
    weight = torch.ones(3, 2, dtype=torch.int8)
    (linear,) = quant_linears([{"weight": weight, "weight_scale": torch.ones(3, 1)}], scheme="w8a8_dynamic")

    assert linear.fused.kernel is REFERENCE
    assert linear.kernel_kind == "simulated"


@pytest.mark.parametrize("name", ["typo", "VNNI"])
def test_a_forced_kernel_that_does_not_run_here_is_refused(monkeypatch, name):
    monkeypatch.setenv(FORCED, name)

    with pytest.raises(ConfigError, match=f"must run on cpu here, but got '{name}'; use one of"):
        kernel_for(CPU, SHAPE)


def test_saying_how_a_layer_runs_times_nothing(monkeypatch):
    monkeypatch.setattr(selection, "_measure", lambda *_: pytest.fail("timed"))

    assert kind_on(CPU) == candidates(CPU)[0].kind
    monkeypatch.setenv(FORCED, "reference")
    assert kind_on(CPU) == "simulated"
    monkeypatch.setenv(FORCED, "typo")
    with pytest.raises(ConfigError, match="must run on cpu here"):
        kind_on(CPU)


def test_where_no_native_kernel_runs_the_reference_is_the_candidate():
    assert candidates(torch.device("meta")) == (REFERENCE,)


def test_without_a_c_compiler_the_c_kernels_are_not_there(monkeypatch, cache):
    monkeypatch.setattr(x86_build.shutil, "which", lambda _: None)
    x86_build._library.cache_clear()
    try:
        assert not any(KERNELS[name].is_available(CPU) for name in ("avx2", "vnni"))
    finally:
        x86_build._library.cache_clear()


def test_a_source_that_does_not_compile_leaves_nothing_behind(monkeypatch, cache):
    monkeypatch.setattr(x86_build, "_FLAGS", ("-no-such-flag",))
    x86_build._library.cache_clear()
    try:
        assert not KERNELS["avx2"].is_available(CPU)
        assert list(cache.iterdir()) == []
    finally:
        x86_build._library.cache_clear()


def probe(build=x86_build.AVX2_BUILD):
    """Pack a weight with the library of a build, loaded anew."""
    x86_build._library.cache_clear()
    try:
        return KERNELS[build.name].is_available(CPU) and KERNELS[build.name].prepare(torch.ones(3, 5, dtype=torch.int8))
    finally:
        x86_build._library.cache_clear()


has_avx2 = pytest.mark.skipif(not KERNELS["avx2"].is_available(CPU), reason="needs AVX2 and a C compiler")


@has_avx2
def test_a_damaged_library_is_built_anew(cache, tmp_path, monkeypatch, caplog):
    assert probe() is not False
    (library,) = cache.glob("int8_avx2-*.so")
    damaged = tmp_path / "other" / "hyquant" / library.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))

    assert probe() is not False
    assert "this process builds its own" in caplog.text


@has_avx2
def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch, two_kernels):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")

    assert probe() is not False
    assert kernel_times(CPU, SHAPE).keys() == {"reference", "int_mm"}


@has_avx2
def test_a_compiler_that_fails_leaves_it_to_the_next(cache, monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    which = x86_build.shutil.which
    monkeypatch.setattr(x86_build.shutil, "which", lambda name: str(broken) if name == "cc" else which(name))

    assert probe() is not False
