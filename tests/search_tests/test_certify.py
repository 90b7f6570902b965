"""Certificates of tiny exports, end to end by the command: what passes, what fails, what is refused."""

import json
import os
import shutil
from pathlib import Path

import optuna
import pytest
import yaml
from safetensors.torch import load_file, save_file

from hyquant.calibration.store import Store, write_atomically
from hyquant.config import digest
from hyquant.export import read_manifest
from hyquant.export.folder import sha256_of
from hyquant.export.manifest import FileInfo
from search.artifacts import removals
from search.certificate import read_certificate
from search.certifying import heldout_pairs
from search.cli import exit_code_of
from search.prompts import StudyPrompts, load_heldout_prompts, read_prompts
from search.study import ArtifactsConfig
from search.study_file import load_study

NUM_PROMPTS = 6
STUDY = {
    "name": "tiny-study",
    "model": {"kind": "tiny", "source": "0", "device": "cpu"},
    "space": "mini",
    "workload": {
        "calibration_prompts": "mini:calibration",
        "search_prompts": "mini:search",
        "settings": {"height": 16, "width": 16, "num_frames": 5, "num_steps": 2},
    },
    "deployment": {"height": 16, "width": 16, "num_frames": 5, "num_steps": 2},
    "judge": {"model": "hashing"},
    "certificate": {
        "prompts": "mini:heldout",
        "num_prompts": NUM_PROMPTS,
        "margins": [
            {"metric": "clip_prompt", "loss": 0.02},
            {"metric": "psnr_db", "min": 30},
            {"metric": "collapsed", "max": 0.5},
        ],
    },
}


@pytest.fixture
def export(almost_float, tmp_path) -> Path:
    shutil.copytree(almost_float, tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """One store for all tests of this file, so that float clips are rendered once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def study(tmp_path, store) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "store": str(store)}))
    return path


@pytest.fixture
def certify(capsys):
    """Run `certify --json`; returns exit code, answer (None after an error) and stderr."""

    def run(export, *arguments):
        code = exit_code_of(["certify", str(export), *map(str, arguments), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else None, captured.err

    return run


def scale_weights(export: Path, factor: float) -> None:
    """Multiply the scales of an export's weights, and make its manifest agree, as a wrong recipe would."""
    manifest = read_manifest(export)
    weights = export / manifest.names[0].weights
    tensors = load_file(weights)
    changed = [name for name in tensors if name.endswith("weight_scale")]
    save_file({name: tensor * factor if name in changed else tensor for name, tensor in tensors.items()}, weights)
    weights.chmod(0o640)
    info = FileInfo(size_bytes=weights.stat().st_size, sha256=sha256_of(weights))
    forged = manifest.model_copy(update={"files": {**manifest.files, weights.name: info}})
    write_atomically(export / "hyq_manifest.json", forged.model_dump_json().encode())
    assert changed


def test_an_export_that_renders_as_float_passes_and_the_certificate_is_bound_to_its_bytes(
    export, study, certify, capsys
):
    code, answer, _ = certify(export, "--study", study)
    written = read_certificate(export)

    assert (code, answer["verdict"]) == (0, "PASS")
    assert written.model_dump(mode="json") == answer
    assert [metric["verdict"] for metric in answer["metrics"]] == ["PASS"] * 3
    assert answer["metrics"][2]["p"] == pytest.approx(0.5**NUM_PROMPTS)
    assert answer["files"] == {
        path.name: sha256_of(path) for path in export.iterdir() if "certificate" not in path.name
    }
    assert answer["prompts_digest"] == digest(list(read_prompts("mini:heldout", Path()))[:NUM_PROMPTS])
    assert len({(pair["prompt"], pair["seed"]) for pair in answer["pairs"]}) == 2 * NUM_PROMPTS

    assert exit_code_of(["verify", str(export), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["certificate"] == {"verdict": "PASS", "study": "tiny-study", "created": written.created}

    scale_weights(export, 1.001)
    assert exit_code_of(["verify", str(export), "--json"]) == 3
    verified = json.loads(capsys.readouterr().out)
    assert not verified["ok"]
    assert any("was given for other bytes of quant_model_weight" in problem for problem in verified["problems"])


def test_a_damaged_export_fails_with_the_metric_that_saw_it(export, study, certify):
    scale_weights(export, 3.0)
    code, answer, _ = certify(export, "--study", study)
    verdicts = {metric["metric"]: metric["verdict"] for metric in answer["metrics"]}

    assert (code, answer["verdict"]) == (3, "FAIL")
    assert verdicts["psnr_db"] == "FAIL"
    assert "FAIL on 6 held-out prompts, 12 pairs" in (export / "certificate.html").read_text()


def test_a_certificate_is_repeated_without_the_study_and_nothing_has_moved(export, study, store, certify):
    certify(export, "--study", study)
    code, answer, _ = certify(export, "--again", "--store", store)

    assert (code, answer["before"], answer["certificate"]["verdict"]) == (0, "PASS", "PASS")
    assert {(move["moved"], move["floor"], move["is_beyond_floor"]) for move in answer["moves"]} == {(0.0, 0.0, False)}
    assert answer["changed_software"] == []


def test_clips_of_other_software_serve_as_those_of_then_and_not_as_those_of_today(
    export, study, tmp_path, certify, monkeypatch
):
    store = tmp_path / "store"
    study.write_text(yaml.safe_dump({**STUDY, "store": str(store)}))
    with monkeypatch.context() as older:
        for module in ("hyquant.calibration.capture", "search.certifying"):
            older.setattr(f"{module}.software_versions", lambda: {"torch": "0.1", "diffusers": "0.2"})
        certify(export, "--study", study)
    clips_of_then = set(store.rglob("*.safetensors"))
    _, again, _ = certify(export, "--again", "--store", store)
    certify(export, "--study", study, "--overwrite")

    assert {(move["metric"], move["floor"]) for move in again["moves"]} >= {("psnr_db", 0.0)}
    assert any(change.startswith("torch 0.1 -> ") for change in again["changed_software"])
    assert len(set(store.rglob("*.safetensors")) - clips_of_then) == len(clips_of_then) == 2 * 2 * NUM_PROMPTS


def test_a_quota_takes_no_clip_that_a_certificate_was_given_for(export, study, tmp_path, certify):
    """Twelve clips of the export and twelve of float stay; a float clip of a trial goes."""
    store = tmp_path / "store"
    study.write_text(yaml.safe_dump({**STUDY, "store": str(store)}))
    certify(export, "--study", study)
    Store(store / "cache").put("video-of-a-trial", {}, {"prompt": "x", "seed": 0})
    for path in store.rglob("*"):
        os.utime(path, (1000, 1000))
    gone = removals(store, optuna.create_study(), ArtifactsConfig(quota_gb=1e-9), is_server=False)

    assert {path.stem for one in gone for path in one.paths} == {"video-of-a-trial"}
    assert len(list(store.glob("cache/*.json"))) == 1 + 4 * NUM_PROMPTS


def test_a_certificate_whose_clips_moved_more_than_float_is_exit_code_3(export, study, store, certify, caplog):
    """New software is played by weights whose scales have changed while the certificate is told that they have not."""
    certify(export, "--study", study)
    scale_weights(export, 1.3)
    certificate = read_certificate(export)
    digests = {path.name: sha256_of(path) for path in export.iterdir() if path.name in certificate.files}
    moved = certificate.model_copy(
        update={"files": digests, "software": certificate.software.model_copy(update={"packages": {"torch": "0.1"}})}
    )
    write_atomically(export / "certificate.json", moved.model_dump_json().encode())
    code, answer, _ = certify(export, "--again", "--store", store)
    moves = {move["metric"]: move for move in answer["moves"]}

    assert code == 3
    assert moves["psnr_db"]["is_beyond_floor"] is None
    assert "24 of 24 clips of then are not in" in caplog.text
    assert "so floors of psnr_db, collapsed stay unknown" in caplog.text
    assert moves["psnr_db"]["after"] < moves["psnr_db"]["before"]
    assert moves["psnr_db"]["floor"] is None  # the clips that were certified are those of other bytes
    assert not moves["collapsed"]["is_beyond_floor"]
    assert any(change.startswith("torch 0.1 -> ") for change in answer["changed_software"])


def test_a_changed_export_is_not_repeated(export, study, certify):
    certify(export, "--study", study)
    scale_weights(export, 1.5)
    code, _, error = certify(export, "--again")

    assert code == 1
    assert "only what was certified can be repeated, but certificate.json was given for other bytes" in error


def test_an_export_is_certified_once_unless_told(export, study, certify):
    certify(export, "--study", study)
    refused, _, error = certify(export, "--study", study)
    replaced, _, _ = certify(export, "--study", study, "--overwrite")

    assert (refused, replaced) == (1, 0)
    assert "(PASS, " in error


def test_too_few_prompts_for_the_flags_are_inconclusive_with_the_number_that_do(export, study, store, certify):
    section = {**STUDY["certificate"], "margins": [{"metric": "collapsed", "max": 0.3}]}
    study.write_text(yaml.safe_dump({**STUDY, "certificate": section, "store": str(store)}))
    code, answer, _ = certify(export, "--study", study)

    assert (code, answer["verdict"], answer["new_prompts"]) == (3, "INCONCLUSIVE", 9)


def test_a_damaged_certificate_is_one_sentence(export, study, certify):
    (export / "certificate.json").write_text('{"verdict": "PASS"}')
    code, _, error = certify(export, "--study", study)

    assert code == 1
    assert "must be a certificate of format 2, but new_prompts is wrong" in error
    assert "certify again with --overwrite" in error


def test_what_cannot_be_certified_is_one_sentence(export, study, tmp_path, certify):
    def refusal(**changes):
        study.write_text(yaml.safe_dump({**STUDY, "store": str(tmp_path / "store"), **changes}))
        code, _, error = certify(export, "--study", study)
        assert code == 1
        return error.splitlines()[-1]

    settings = {**STUDY["workload"]["settings"], "num_steps": 3}

    assert "none was named; give --study STUDY" in certify(export)[2]
    assert "has none; certify it with --study STUDY" in certify(export, "--again")[2]
    assert "study tiny-study states none" in refusal(certificate=None)
    assert "made for 2 and the study renders 3" in refusal(workload={**STUDY["workload"], "settings": settings})
    assert "load the same weights" in refusal(model={**STUDY["model"], "source": "1"})
    assert "served for search, the first" in refusal(certificate={**STUDY["certificate"], "prompts": "mini:search"})
    assert "99 prompts are asked" in refusal(certificate={**STUDY["certificate"], "num_prompts": 99})


def test_held_out_prompts_are_new_whatever_their_case_and_spaces(tmp_path, study):
    (tmp_path / "heldout.txt").write_text("a fox\nA  Hen\na cow\n")
    certificate = load_study(study).certificate.model_copy(update={"prompts": "heldout.txt", "num_prompts": 3})
    used = StudyPrompts(calibration=("a cat",), search=("a hen",))

    with pytest.raises(ValueError, match="1 of 3 served for search, the first 'A  Hen'"):
        load_heldout_prompts(certificate, tmp_path, used)
    fresh = used.model_copy(update={"search": ("a dog",)})
    assert load_heldout_prompts(certificate, tmp_path, fresh) == ("a fox", "A  Hen", "a cow")


def test_a_study_whose_held_out_prompts_are_searched_with_is_refused_before_it_runs(study, tmp_path, capsys):
    section = {**STUDY["certificate"], "prompts": "mini:search"}
    study.write_text(yaml.safe_dump({**STUDY, "certificate": section, "store": str(tmp_path / "store")}))

    assert exit_code_of(["run", str(study)]) == 1
    assert "6 of 6 served for search" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_no_two_pairs_share_prompt_and_noise():
    pairs = heldout_pairs(["a", "b"], 2, 42)

    assert [pair.prompt for pair in pairs] == ["a", "a", "b", "b"]
    assert len({pair.seed for pair in pairs}) == 4


@pytest.mark.parametrize(
    ("margin", "sentence"),
    [
        ({"metric": "ssmi", "min": 0.9}, "did you mean 'ssim'"),
        ({"metric": "collapsed", "max": 0.0}, "no number of prompts shows that none ever fails"),
        ({"metric": "collapsed", "min": 0.5}, "must be a loss or a max"),
        ({"metric": "psnr_db", "loss": 0.5}, "psnr_db compares with the float video, so its margin must be min, max"),
        ({"metric": "clip_reference", "max": 0.95}, "which score 1, but got at most 0.95; give a min below it"),
        ({"metric": "flicker", "min": 0.5}, "which score 0, but got at least 0.5; give a max above it"),
        ({"metric": "motion_energy_ratio", "min": 1.1, "max": 1.5}, "at most 1.5; give a min below it, a max above"),
        ({"metric": "clip_prompt", "loss": 2.0}, "scores lie from -1 to 1, but got loses at most 2; give one within"),
        ({"metric": "clip_prompt", "min": 24.0}, "scores lie from -1 to 1, but got at least 24; give one within"),
        ({"metric": "motion_energy_ratio", "min": 0.0, "max": 1.25}, "scores lie from 0 to inf, but got at least 0"),
        ({"metric": "flicker", "max": 99.0}, "scores lie from 0 to .*, but got at most 99; give one within these"),
    ],
)
def test_a_margin_that_nothing_can_keep_is_refused_with_the_study_file(study, margin, sentence):
    names = ["clip_prompt", "clip_reference", "psnr_db", "ssim", "motion_energy_ratio", "flicker", "collapsed"]
    section = {"prompts": "mini:heldout", "margins": [margin]}
    study.write_text(yaml.safe_dump({**STUDY, "metrics": names, "certificate": section}))

    with pytest.raises(ValueError, match=sentence):
        load_study(study)


def test_frames_too_small_for_a_metric_are_refused_with_the_study_file(study):
    small, large = ({**STUDY["workload"]["settings"], "height": height, "width": 208} for height in (160, 176))
    names = ["clip_prompt", "clip_reference", "motion_energy_ratio", "collapsed", "ms_ssim"]

    def read(settings, own):
        section = {**STUDY["certificate"], "margins": [{"metric": "ms_ssim", "min": 0.5}], "settings": own}
        workload = {**STUDY["workload"], "settings": settings}
        study.write_text(yaml.safe_dump({**STUDY, "workload": workload, "metrics": names, "certificate": section}))
        return load_study(study)

    assert read(large, large).metrics == tuple(names)
    with pytest.raises(ValueError, match=r"metrics: ms_ssim needs .* 176 pixels .*, but workload\.settings .* 208x160"):
        read(small, large)
    with pytest.raises(ValueError, match=r"margins: ms_ssim needs .* 176 .*, but certificate\.settings .* 208x160"):
        read(large, small)


def test_margins_may_be_added_to_a_study_that_was_run(study):
    config = load_study(study)

    assert config.identity() == config.model_copy(update={"certificate": None}).identity()
