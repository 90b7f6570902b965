"""What is written is for its owner and group: exactly 0640 and 0750 where others read it, never more anywhere."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

from hyquant import DumperManager, SaveProcessorConfig, SessionConfig, W8A8DynamicProcessorConfig, quant_model
from hyquant.calibration.records import write_records
from hyquant.calibration.shared import SharedStore
from hyquant.calibration.store import Store
from hyquant.file_modes import make_folder
from hyquant.kernels import x86_build
from hyquant.models import mini
from hyquant.models.base import Record
from hyquant.sensitivity.files import Journal
from hyquant.sensitivity.map import Measurement
from hyquant.video.saving import require_savable, save_video
from search.certificate import Certificate, write_certificate
from search.cli import exit_code_of
from search.run_log import RunLog
from search.spool import Spool
from tools.fuzz import seeds


def _export_and_its_certificate(folder):
    payload = seeds.certificates(folder)[0]  # makes an export and its statistics in the folder
    write_certificate(folder / "export", Certificate.model_validate_json(payload))


def _quantized_checkpoint(folder):
    config = folder / "dynamic.yaml"
    config.write_text("linear: {kind: w8a8_dynamic}\n")
    command = ["quantize-checkpoint", "--in", str(mini.WEIGHTS), "--out", str(folder / "deep" / "out")]
    assert exit_code_of([*command, "--config", str(config)]) == 0
    config.unlink()


def _captured_inputs(folder):
    write_records(folder / "deep" / "records", lambda sink: sink(Record(0, 0, {"x": torch.ones(2)})))


def _caches(folder):
    make_folder(folder / "deep" / "shared")
    store = SharedStore(folder / "deep" / "host", folder / "deep" / "shared")
    store.put("key", {"x": torch.ones(2)}, {})
    write_records(store.folder("records"), lambda sink: sink(Record(0, 0, {"x": torch.ones(2)})))
    store.give_folder("records", lambda _: True)
    assert Store(folder / "deep" / "shared").holds("key")
    assert (folder / "deep" / "shared" / "records").is_dir()


def _session_outputs(folder):
    model = nn.Sequential(nn.Linear(8, 8))
    dumper = DumperManager(model)
    model(torch.ones(1, 8))
    dumper.save(folder / "deep" / "calls.pt")
    processors = {
        "w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=[]),
        "save": SaveProcessorConfig(output_path=folder / "deep" / "out"),
    }
    quant_model(model, SessionConfig(processor_cfg_map=processors, calib_data=[], device="cpu"))


def _sensitivity(folder):
    line = seeds.maps(folder)[1]
    Journal(folder / "deep" / "map.jsonl").add(Measurement.model_validate_json(line))


def _spooled_logs(folder):
    Spool(folder / "deep", "demo").add("trial-0", RunLog(number=0))


def _videos(folder):
    path = folder / "deep" / "video.mp4"
    require_savable([path], overwrite=False)
    save_video(path, torch.zeros(5, 3, 16, 16))


WRITERS = {
    "an export and its certificate": _export_and_its_certificate,
    "a quantized checkpoint": _quantized_checkpoint,
    "captured inputs": _captured_inputs,
    "caches": _caches,
    "a session's outputs": _session_outputs,
    "a sensitivity journal": _sensitivity,
    "spooled logs": _spooled_logs,
    "videos": _videos,
}


@pytest.fixture(params=[0o000, 0o022, 0o077], ids="umask{:03o}".format)
def any_umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes_below(folder):
    """Return the mode of every folder and file, by its path."""
    return {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_modes_do_not_depend_on_the_umask(any_umask, tmp_path, write):
    write(tmp_path)
    found = modes_below(tmp_path)

    assert any(path.is_file() for path in found)
    wrong = {path: oct(mode) for path, mode in found.items() if mode != (0o750 if path.is_dir() else 0o640)}
    assert wrong == {}


def test_a_folder_that_is_there_keeps_its_mode(any_umask, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o700)

    Store(tmp_path / "mine").put("key", {"x": torch.ones(2)}, {})

    assert modes_below(tmp_path)[tmp_path / "mine"] == 0o700


def test_what_a_command_makes_is_not_for_all_the_world_to_read(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; import search.cli as cli\n"
        "cli.exit_code_of = lambda _: Path('made').mkdir() or Path('made/log.txt').write_text('x') and 0\n"
        "os.umask(0)\n"
        "cli.main()"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}, check=True
    )

    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "made" / "log.txt").stat().st_mode & 0o777 == 0o640


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compile to a file that says how often; return where it is kept and how to load it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = x86_build.cache_folder()
    built = []

    def compile_(flags, path):
        built.append(path)
        path.write_bytes(b"library")
        path.chmod(0o640)
        return True

    monkeypatch.setattr(x86_build, "_compile", compile_)
    monkeypatch.setattr(x86_build.ctypes, "CDLL", lambda path: path)
    return folder / "one.so", built


def test_a_library_that_others_could_have_written_is_built_again(compiled):
    """What lies in the kernels' cache is executed."""
    kept, built = compiled
    kept.parent.mkdir(parents=True)
    kept.parent.chmod(0o777)
    kept.write_bytes(b"planted")
    kept.chmod(0o666)

    assert x86_build._loaded((), kept.name) == str(kept)
    assert built == [kept]
    assert kept.read_bytes() == b"library"
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o750
    assert x86_build._loaded((), kept.name) == str(kept)
    assert built == [kept]
