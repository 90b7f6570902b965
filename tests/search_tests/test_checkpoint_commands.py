"""`calibrate` and `quantize-checkpoint` as a user types them: answers, remarks, and refusals of one line."""

import json

import pytest

from hyquant.export import read_manifest, verify_export
from hyquant.models import load_model, mini
from search.cli import exit_code_of

STUDY = """
name: small
store: {store}
model: {{kind: hunyuan_video, source: mini, device: cpu}}
space: mini
workload:
  calibration_prompts: mini:calibration
  search_prompts: mini:search
  num_calibration_prompts: 1
  num_search_prompts: 1
  settings: {{height: 32, width: 32, num_frames: 5, num_steps: 2}}
deployment: {{height: 32, width: 32, num_frames: 5, num_steps: 2}}
judge: {{model: hashing}}
latency: {{rounds: 3, warmup: 1, compile: false}}
budget: {{trials: 2}}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.yaml").write_text(STUDY.format(store=folder / "mlruns"))
    (folder / "static.yaml").write_text("linear: {kind: w8a8_static}\nlayers: {exclude: ['*img_mod*']}\n")
    (folder / "dynamic.yaml").write_text("linear: {kind: w8a8_dynamic}\n")
    return folder


def test_a_config_is_calibrated_and_the_checkpoint_quantized_with_it(study, tmp_path, capsys):
    """One story in one test, because the second command needs the file of the first."""
    stats, out = tmp_path / "stats.safetensors", tmp_path / "out"
    code = exit_code_of(
        ["calibrate", str(study / "study.yaml"), str(study / "static.yaml"), "--out", str(stats), "--json"]
    )
    told = json.loads(capsys.readouterr().out)

    assert code == 0
    assert told["num_steps"] == 2
    assert told["size_bytes"] == stats.stat().st_size

    command = ["quantize-checkpoint", "--in", str(mini.WEIGHTS), "--out", str(out), "--stats", str(stats)]
    code = exit_code_of([*command, "--config", str(study / "static.yaml"), "--dtype", told["dtype"], "--json"])
    answer = json.loads(capsys.readouterr().out)

    assert code == 0
    assert answer["denoiser"] == told["denoiser"]
    assert set(answer["files"]) == set(read_manifest(out).files)
    assert answer["layer_counts"]["w8a8_static"] > 0
    assert verify_export(out, load_model("hunyuan_video", "mini", dtype="float32")).ok

    assert exit_code_of(["calibrate", str(study / "study.yaml"), str(study / "static.yaml"), "--out", str(stats)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_config_that_stores_nothing_needs_no_statistics(study, tmp_path, capsys):
    stats = tmp_path / "stats.safetensors"
    code = exit_code_of(["calibrate", str(study / "study.yaml"), str(study / "dynamic.yaml"), "--out", str(stats)])

    assert code == 1
    assert "stores none" in capsys.readouterr().err
    assert not stats.exists()


def test_the_plain_answer_says_how_to_load_the_export(study, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["quantize-checkpoint", "--in", str(mini.WEIGHTS / "transformer"), "--out", str(out)]
    code = exit_code_of([*command, "--config", str(study / "dynamic.yaml"), "--steps", "2"])
    told = capsys.readouterr().out

    assert code == 0
    assert "float16, denoiser" in told
    assert "load_quantized" in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--in", "nowhere"], "does not exist"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--stats", "nowhere.safetensors"], "must be a file that hyq-search calibrate wrote"),
        (["--target", "mindie-sd-3.1/910b", "--layout", "diffusers"], "original"),
    ],
)
def test_a_bad_option_is_one_line(options, said, study, tmp_path, capsys):
    command = ["quantize-checkpoint", "--in", str(mini.WEIGHTS), "--out", str(tmp_path / "out")]
    code = exit_code_of([*command, "--config", str(study / "dynamic.yaml"), *options])
    error = capsys.readouterr().err

    assert code == 1
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
