"""What the fuzzers found, as the smallest input of each, and whether the fuzzers' oracle sees what it must."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

from hyquant.calibration.file import CalibrationInfo
from hyquant.config import QuantConfig
from hyquant.errors import ExportError
from hyquant.export import verify_export
from search.cli import exit_code_of
from tools.fuzz import seeds
from tools.fuzz.oracle import KNOWN
from tools.fuzz.targets import BYTES, TREES

ROOT = Path(__file__).parents[2]


def header(**changes):
    return json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}).encode()


def several_disks():
    """An archive whose last record says that it begins on another disk."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"")
    content = archive.getvalue()
    locator = b"PK\x06\x07" + bytes(12) + (2).to_bytes(4, "little")
    return content[:-22] + locator + content[-22:]


def statistics(*names, shape=(2, 4)):
    info = CalibrationInfo(config=QuantConfig(linear=None), num_steps=2, denoiser="0" * 16, dtype="float32")
    return save({name: torch.zeros(shape) for name in names}, metadata={"hyq_calibration": info.model_dump_json()})


REFUSED = {
    "lists in lists": ("study-bytes", b"name: x\nspace: " + b"[" * 500),
    "a day that does not exist": ("study-bytes", b"name: 2024-99-99"),
    "a tag that the value does not fit": ("study-bytes", b"name: !!float x"),
    "a text that stands for 43 million values": ("study-bytes", seeds._LAUGHS),
    "a space of as many": ("space-bytes", seeds._LAUGHS),
    "a space that is no text": ("space-bytes", b"\xff"),
    "a space with a name that no file can have": ("study", b'name: x\nspace: "%s.yaml"' % (b"a" * 300)),
    "a config that holds itself": ("config", b"linear: &a [*a]"),
    "a device that holds itself": ("device-profile", b"name: &a [*a]"),
    "a shape without bounds": ("header-bytes", header(shape=[float("inf")])),
    "a shape below zero": ("header-bytes", header(shape=[-1, -2])),
    "a place before the data": ("header-bytes", header(data_offsets=[-8, 0])),
    "a header of lists in lists": ("header-bytes", b"[" * 5000),
    "an index of lists in lists": ("index", b"[" * 5000),
    "a shard with a name that no file can have": ("index", b'{"weight_map": {"": %d}}' % 10**300),
    "a shard elsewhere": ("index", b'{"weight_map": {"b": "../one.safetensors"}}'),
    "statistics without ranges": ("statistics-bytes", statistics("stats/g/hi")),
    "statistics with ranges of no channel": ("statistics-bytes", statistics("stats/g/lo", shape=(2,))),
    "statistics without counts": ("statistics-bytes", statistics("stats/g/lo", "stats/g/hi")),
    "statistics with more than there is": ("statistics-bytes", statistics("stats/g/lo", "stats/g/x")),
    "statistics of half a head": ("statistics-bytes", statistics("heads/b/x")),
    "an archive on several disks": ("pt-bytes", several_disks()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_was_found_is_refused_in_a_sentence(what, tmp_path):
    name, payload = REFUSED[what]
    target = TREES[name][0] if name in TREES else BYTES[name]
    target.seeds(tmp_path)

    with pytest.raises(KNOWN) as refusal:
        target.read(tmp_path, payload)

    assert 20 < len(str(refusal.value)) < 4000


def test_a_certificate_of_no_clip_is_refused(tmp_path):
    document = json.loads(seeds.certificates(tmp_path)[0])
    assert document["verdict"] == "INCONCLUSIVE"

    with pytest.raises(KNOWN, match="pairs is wrong"):
        TREES["certificate"][0].read(tmp_path, json.dumps(document | {"pairs": []}).encode())


@pytest.mark.parametrize(
    "command", [["status"], ["verify"], ["quantize-checkpoint", "--out", "o", "--config", "c", "--in"]]
)
def test_a_path_that_no_file_can_have_is_refused_in_a_line(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").write_text("linear: {kind: w8a16}")

    assert exit_code_of([*command, "a" * 300]) == 1

    assert "a path must be short enough" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "a\\b", ".x", "", "C:x", "x\0", "x" * 300, "x\n"])
@pytest.mark.parametrize("kind", ["manifest", "certificate"])
def test_files_outside_of_an_export_cannot_be_named(kind, name, tmp_path):
    target = TREES[kind][0]
    document = json.loads(target.seeds(tmp_path)[0])
    document["files"][name] = next(iter(document["files"].values()))

    with pytest.raises(KNOWN, match="name no folder"):
        target.read(tmp_path, json.dumps(document).encode())


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "", "x\n", "x" * 101])
def test_a_study_cannot_be_named_out_of_its_store(name, tmp_path):
    target = TREES["study"][0]
    document = yaml.safe_load(target.seeds(tmp_path)[-1]) | {"name": name}

    with pytest.raises(KNOWN, match="name: string should"):
        target.read(tmp_path, yaml.safe_dump(document).encode())


@pytest.mark.parametrize("kind", [{}, [], 1, None, "W9"])
def test_a_description_of_no_known_kind_is_a_problem_of_the_export(kind, tmp_path):
    target = TREES["description"][0]
    document = json.loads(target.seeds(tmp_path)[0]) | {"model_quant_type": kind}
    target.read(tmp_path, json.dumps(document).encode())

    problems = verify_export(tmp_path / "foreign").problems

    assert any("must have model_quant_type of the engine's algorithms" in problem for problem in problems)


@pytest.mark.parametrize(("name", "kind"), [("c:x", "W8A8"), ("x", "../W8A8"), ("x", "W" * 300)])
def test_a_description_that_leads_to_another_folder_is_refused(name, kind, tmp_path):
    (tmp_path / f"quant_model_description_{name}.json").write_text(json.dumps({"model_quant_type": kind}))

    with pytest.raises(ExportError, match="plain file names"):
        verify_export(tmp_path)


@pytest.mark.parametrize("payload", [b"[" * 5000 + b"\n", b'{"meta": NaN, "sha256": 1}\n'])
def test_a_cache_entry_that_cannot_be_read_counts_as_missing(payload, tmp_path):
    assert BYTES["cache-bytes"].read(tmp_path, payload) is None


def test_a_hundred_thousand_prompts_are_read_at_once(tmp_path):
    payload = "\n".join(map(str, range(100_000))).encode()

    assert len(BYTES["prompts-bytes"].read(tmp_path, payload)) == 100_000


@pytest.mark.parametrize("payload", seeds.pickles(Path()))
def test_no_pickle_runs(payload, tmp_path):
    with pytest.raises(KNOWN):  # those without code are no denoiser
        BYTES["pt-bytes"].read(tmp_path, payload)

    assert not seeds.BOMB_FOLDER.exists()


def test_the_bomb_would_go_off():
    made = subprocess.run(
        [sys.executable, "-c", "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"],
        input=pickle.dumps(seeds.Bomb()), env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert made.returncode == 0
    assert seeds.BOMB_FOLDER.exists()
    seeds.BOMB_FOLDER.rmdir()


BAD_READERS = {
    "a traceback": "{}[1]",
    "an empty message": "raise_(ConfigError(''))",
    "a hang": "[None for _ in iter(int, 1)]",
    "a gigabyte": "len(bytearray(3 * 2**30))",
    "a file elsewhere": "open(folder.parent / 'hyq-elsewhere', 'w')",
    "a process": "os.system('true')",
    "an unpickled class": "pickle.loads(pickle.dumps(Path))",
    "a connection": "socket.create_connection(('127.0.0.1', 9))",
}
GOOD_READERS = {
    "a sentence": "raise_(ConfigError('a value must be small, but got 9; take less'))",
    "a file inside": "(folder / 'x').write_text('x')",
}


@pytest.mark.multiproc
@pytest.mark.parametrize("what", [*BAD_READERS, *GOOD_READERS])
def test_the_oracle_sees_what_it_must(what):
    code = f"""
import os, pickle, socket, sys
from pathlib import Path
from hyquant.errors import ConfigError
from tools.fuzz import oracle
oracle.PATIENCE_S = 1.0
folder, judge = oracle.guarded_folder()
def raise_(error): raise error
finding = judge.judge(lambda: {(BAD_READERS | GOOD_READERS)[what]})
Path(folder / 'x').unlink(missing_ok=True)
folder.rmdir()
sys.exit(7 if finding else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False)

    assert done.returncode == (7 if what in BAD_READERS else 0)
