import json
import os
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

from hyquant.errors import ConfigError, ExportError
from hyquant.export import load_quantized, read_manifest
from hyquant.export.snippets import hyquant_snippet, mindie_snippet
from hyquant.models import load_model
from hyquant.models.base import RenderSettings
from search.cli import exit_code_of
from search.errors import SearchError, StoreError
from search.rendering import clip_settings
from search.ui import server_command


@pytest.fixture
def export(stored_store, tmp_path, capsys):
    """The safe pick of the stored study, exported by the command; returns its folder and the command's answer."""
    out = tmp_path / "weights"
    code = exit_code_of(["export", "demo", "--pick", "safe", "--out", str(out), "--store", str(stored_store), "--json"])
    answer = json.loads(capsys.readouterr().out)

    assert code == 0
    return out, answer


def test_an_export_is_verified_rendered_and_told_how_to_load(export, capsys, tmp_path):
    """One story in one test, because each step needs the export of the one before."""
    out, answer = export
    manifest = read_manifest(out)

    assert answer["verify"]["ok"]
    assert answer["verify"]["forward"]
    assert "safe" in answer["trial"]["picks"]
    assert set(answer["files"]) == set(manifest.files)
    assert manifest.config.model_dump(mode="json") == answer["trial"]["config"]

    assert exit_code_of(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []

    arguments = ["render", str(out), "--prompt", "a red circle", "--size", "32x32", "--frames", "5", "--json"]
    assert exit_code_of([*arguments, "--out", str(tmp_path / "clips")]) == 0
    rendered = json.loads(capsys.readouterr().out)
    with Image.open(tmp_path / "clips" / "strip.png") as strip:
        assert strip.width > 100
    assert [path.rsplit("/", 1)[-1] for path in rendered["files"]] == ["videos.mp4", "strip.png"]

    namespace: dict[str, object] = {}
    exec(hyquant_snippet(out, manifest), namespace)  # the lines a user pastes
    loaded = namespace["model"]
    again = load_model("tiny", "0", device="cpu")
    load_quantized(again.denoiser, out, again.clock)
    settings = RenderSettings(height=32, width=32, num_frames=5, num_steps=4)
    assert torch.equal(loaded.render(["x"], [1], settings)[0], again.render(["x"], [1], settings)[0])


def test_copies_per_rank_and_parts_are_written_when_asked_for(stored_store, tmp_path, capsys):
    arguments = ["export", "demo", "--pick", "safe", "--store", str(stored_store), "--json", "--out"]
    assert exit_code_of([*arguments, str(tmp_path / "ranks"), "--ranks", "2", "--target", "mindie-sd-3.1/910b"]) == 0
    ranks = json.loads(capsys.readouterr().out)
    assert exit_code_of([*arguments, str(tmp_path / "parts"), "--part-size", "0.00004"]) == 0
    parts = json.loads(capsys.readouterr().out)
    assert exit_code_of([*arguments, str(tmp_path / "x"), "--part-size", "1", "--target", "mindie-sd-3.1/910b"]) == 1

    assert "no parts" in capsys.readouterr().err
    assert sorted(ranks["files"]) == [
        f"quant_model_{kind}_w8a8_timestep_{rank}.{suffix}"
        for kind, suffix in (("description", "json"), ("weight", "safetensors"))
        for rank in range(2)
    ]
    assert ranks["target"] == "mindie-sd-3.1/910b"
    assert ranks["verify"]["ok"]
    assert "quant_model_weight_w8a8_timestep.safetensors.index.json" in parts["files"]
    assert parts["verify"]["ok"]
    assert not (tmp_path / "x").exists()


def test_a_damaged_export_is_exit_code_3_with_the_problem_named(export, capsys):
    out, _ = export
    weights = next(out.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code = exit_code_of(["verify", str(out), "--json"])
    answer = json.loads(capsys.readouterr().out)

    assert code == 3
    assert not answer["ok"]
    assert weights.name in answer["problems"][0]


def test_an_export_is_checked_without_its_float_model_too(export, capsys):
    out, _ = export
    code = exit_code_of(["verify", str(out), "--model", "not a seed", "--json"])
    answer = json.loads(capsys.readouterr().out)

    assert code == 0
    assert answer["forward"] == []
    assert answer["compared"].startswith("not compared with the float model: ")


def test_an_existing_folder_is_replaced_only_when_told(export, stored_store, capsys):
    out, _ = export
    before = (out / "hyq_manifest.json").read_bytes()
    arguments = ["export", "demo", "--pick", "fast", "--out", str(out), "--store", str(stored_store)]

    assert exit_code_of(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (out / "hyq_manifest.json").read_bytes() == before
    assert exit_code_of([*arguments, "--overwrite"]) == 0
    assert (out / "hyq_manifest.json").read_bytes() != before


def test_mindie_is_told_which_steps_are_static(export):
    out, _ = export
    manifest = read_manifest(out)
    snippet = mindie_snippet(out, manifest)

    # The safe pick of the stored study is `timestep` with timestep_sep 2 of 4 steps.
    assert 'policy.register(range(2, 4), "static", "w8a8_static_linear")' in snippet
    assert "quant_model_description_w8a8_timestep.json" in snippet
    assert mindie_snippet(out, manifest) == f"export_dir = {str(out)!r}\n{manifest.loader}"
    assert str(out) not in (out / "hyq_manifest.json").read_text()


def test_a_size_that_is_none_is_refused(export):
    for size in ("large", "64", "60x64", "64x"):
        with pytest.raises(ConfigError, match="--size must be WIDTHxHEIGHT"):
            clip_settings(export[0], size=size, num_frames=None)
    with pytest.raises(ConfigError, match="num_frames must be 1"):
        clip_settings(export[0], size=None, num_frames=6)


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/clips"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(export, out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")

    code = exit_code_of(["render", str(export[0]), "--prompt", "x", "--model", "no such seed", "--out", out])

    assert code == 1
    assert f"--out must be a folder, but {out} cannot be made" in capsys.readouterr().err
    assert Path("file").read_text() == "mine"


def test_a_folder_without_rights_is_refused_before_anything_is_loaded(export, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, rights: not rights & os.W_OK)  # root may write anywhere

    assert exit_code_of(["render", str(export[0]), "--prompt", "x", "--out", str(tmp_path)]) == 1
    assert f"--out must be writable, but {tmp_path} is not" in capsys.readouterr().err


def test_a_seed_that_generators_refuse_is_refused_before_anything_is_loaded(tmp_path, capsys):
    assert exit_code_of(["render", str(tmp_path), "--prompt", "x", "--seed", str(2**32)]) != 0
    assert "4294967295" in capsys.readouterr().err


def test_settings_of_a_folder_that_is_no_export_are_refused(tmp_path):
    with pytest.raises(ExportError):
        clip_settings(tmp_path, size=None, num_frames=None)


def test_the_ui_listens_on_loopback_only(mlflow_store):
    command = server_command(mlflow_store, 5999)

    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--backend-store-uri") + 1] == f"sqlite:///{mlflow_store.resolve()}/mlflow.db"


def test_a_taken_port_is_one_sentence(mlflow_store):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(SearchError, match=r"port \d+ must be free"):
            server_command(mlflow_store, holder.getsockname()[1])


def test_the_ui_makes_no_database(tmp_path):
    with pytest.raises(StoreError, match=r"must hold mlflow\.db"):
        server_command(tmp_path, 5999)
    assert list(tmp_path.iterdir()) == []


def test_the_ui_says_in_a_sentence_that_its_database_cannot_be_opened(mlflow_store):
    """A folder in the place of SQLite's log stands for a read-only mount, which tests cannot make."""
    for path in mlflow_store.glob("mlflow.db-*"):
        path.unlink()
    (mlflow_store / "mlflow.db-wal").mkdir()

    with pytest.raises(StoreError, match="in a writable folder, but SQLite says 'unable to open database file'"):
        server_command(mlflow_store, 5999)


def test_the_ui_warns_before_it_serves_others(mlflow_store, monkeypatch, capsys):
    started = []
    monkeypatch.setattr("search.commands.service.os.execve", lambda path, command, _: started.append(command))
    codes = [
        exit_code_of(["ui", "demo", "--store", str(mlflow_store), "--port", "5999", "--host", host])
        for host in ("127.0.0.1", "0.0.0.0")
    ]
    said = capsys.readouterr().err

    assert codes == [0, 0]
    assert [command[command.index("--host") + 1] for command in started] == ["127.0.0.1", "0.0.0.0"]
    assert said.count("MLflow asks for no password") == 1
    assert "whoever reaches 0.0.0.0" in said
