"""What would end hours of rendering is refused before them, and what happens all the same is one sentence."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
import yaml

from hyquant.calibration.store import Store, write_atomically
from hyquant.devices.runtime import runtime_versions
from hyquant.models.base import RenderSettings
from metrics.errors import WeightsMissing
from search.certificate import read_certificate
from search.cli import exit_code_of
from search.clip_space import clip_bytes
from search.leftovers import writer_findings
from search.locks import HostLock, held_by_workers
from search.prompts import StudyPrompts, load_heldout_prompts
from search.storage import create_study
from search.study_file import load_study

STEPS = {"height": 16, "width": 16, "num_frames": 5, "num_steps": 2}
NUM_PAIRS = 3
STUDY = {
    "name": "tiny-study",
    "model": {"kind": "tiny", "source": "0", "device": "cpu"},
    "space": "mini",
    "workload": {"calibration_prompts": "mini:calibration", "search_prompts": "mini:search", "settings": STEPS},
    "deployment": STEPS,
    "judge": {"model": "hashing"},
    "certificate": {
        "prompts": "mini:heldout",
        "num_prompts": NUM_PAIRS,
        "seeds_per_prompt": 1,
        "margins": [{"metric": "psnr_db", "min": 30}],
    },
}


@pytest.fixture
def export(almost_float, tmp_path) -> Path:
    shutil.copytree(almost_float, tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def study(tmp_path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "store": str(tmp_path / "store")}))
    return path


@pytest.fixture
def certify(capsys):
    """Run `certify`; returns exit code and stderr."""

    def run(export, *arguments):
        code = exit_code_of(["certify", str(export), *map(str, arguments), "--json"])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def nothing_is_rendered(monkeypatch):
    monkeypatch.setattr("search.certifying.score_pairs", lambda *_: pytest.fail("clips were rendered"))


@pytest.fixture
def small_disk(monkeypatch):
    """A disk with 65 MiB free: a MiB more than is left alone."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("search.clip_space.shutil.disk_usage", lambda _: usage(2**40, 2**40, 65 * 2**20))


def test_a_read_only_export_is_refused_before_anything_is_rendered(
    export, study, certify, monkeypatch, nothing_is_rendered
):
    may = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (Path(path) == export and mode & os.W_OK) and may(path, mode)
    )
    code, error = certify(export, "--study", study)

    assert code == 1
    assert f"{export} is read-only" in error


def test_a_disk_without_room_for_the_clips_is_refused_before_anything_is_rendered(
    export, study, tmp_path, certify, small_disk, nothing_is_rendered
):
    """Six clips of 4.7 MiB."""
    large = {"height": 256, "width": 320, "num_frames": 5, "num_steps": 2}
    section = {**STUDY["certificate"], "settings": large}
    study.write_text(yaml.safe_dump({**STUDY, "certificate": section, "store": str(tmp_path / "store")}))
    code, error = certify(export, "--study", study)

    assert clip_bytes(RenderSettings(**large)) == 5 * 3 * 256 * 320 * 4
    assert code == 1
    assert f"6 clips take about 28 MiB, but {tmp_path / 'store' / 'cache'} has 65 MiB free" in error


def test_clips_that_are_there_need_no_room_and_repeated_ones_do(export, study, tmp_path, certify, monkeypatch):
    usage = namedtuple("usage", "total used free")
    first = certify(export, "--study", study)
    monkeypatch.setattr("search.clip_space.shutil.disk_usage", lambda _: usage(2**40, 2**40, 0))
    second = certify(export, "--study", study, "--overwrite")
    again = certify(export, "--again", "--store", tmp_path / "store")

    assert first[0] == second[0] == 0
    assert again[0] == 1
    assert "6 clips take about 0 MiB" in again[1]


def test_clips_of_a_repetition_are_kept_in_the_store_and_then_deleted(export, study, tmp_path, certify, monkeypatch):
    certify(export, "--study", study)
    before = set((tmp_path / "store").rglob("*"))
    roots, put = set(), Store.put
    monkeypatch.setattr(Store, "put", lambda self, *entry: roots.add(self.root.parent) or put(self, *entry))

    assert certify(export, "--again", "--store", tmp_path / "store")[0] == 0
    assert roots == {tmp_path / "store"}
    assert set((tmp_path / "store").rglob("*")) == before


@pytest.mark.parametrize("is_again", [False, True])
def test_while_clips_are_rendered_the_store_is_seen_in_use_and_none_of_them_is_a_leftover(
    export, study, tmp_path, certify, monkeypatch, is_again
):
    store, put, leftovers, locks = tmp_path / "store", Store.put, [], set()
    if is_again:
        certify(export, "--study", study)

    def look(self, *entry):
        put(self, *entry)
        for path in store.rglob("*"):
            os.utime(path, (1000, 1000))  # as if a batch took longer than an hour
        leftovers.extend(writer_findings(store, "tiny-study"))
        locks.update(path.name for path in held_by_workers(store))

    monkeypatch.setattr(Store, "put", look)
    assert certify(export, *(["--again", "--store", store] if is_again else ["--study", study]))[0] == 0
    assert leftovers == []
    assert locks == {"certify-0.lock"}


def test_a_disk_that_fills_up_on_the_way_is_one_sentence(export, study, tmp_path, certify, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hyquant.calibration.store.write_atomically", full)
    code, error = certify(export, "--study", study)

    assert code == 1
    assert f"{tmp_path / 'store' / 'cache'} must be a writable folder on a disk with room, but" in error
    assert "No space left" in error


def test_missing_weights_of_any_metric_are_told_before_the_model_is_loaded(export, study, certify, monkeypatch):
    def missing():
        raise WeightsMissing("there are no weights")

    monkeypatch.setattr("search.certifying.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr("search.certifying.find_metric", lambda _: SimpleNamespace(find_weights=missing))
    code, error = certify(export, "--study", study)

    assert code == 1
    assert "there are no weights" in error


def test_a_certificate_that_another_process_wrote_meanwhile_is_kept(export, study, certify, monkeypatch):
    import search.certifying as certifying

    certify_export = certifying.certify_export

    def beaten(*args, **kwargs):
        found = certify_export(*args, **kwargs)
        other = found.model_copy(update={"study": "faster"})
        write_atomically(export / "certificate.json", other.model_dump_json().encode())
        return found

    monkeypatch.setattr(certifying, "certify_export", beaten)
    code, error = certify(export, "--study", study)

    assert code == 1
    assert "an export is certified once" in error
    assert read_certificate(export).study == "faster"


def test_measurements_pass_after_every_denoising_step_of_both_models(export, study, certify, monkeypatch):
    passed = []
    monkeypatch.setattr(HostLock, "let_measurements_pass", lambda self: passed.append(self))

    assert certify(export, "--study", study)[0] == 0
    assert len(passed) == 2 * STEPS["num_steps"]  # three pairs are one batch


def test_a_damaged_certificate_is_a_problem_of_the_export_and_can_be_replaced(export, study, certify, capsys):
    (export / "certificate.json").write_text('{"format_version": 1, "further_pairs": 3}')
    code = exit_code_of(["verify", str(export), "--json"])
    found = json.loads(capsys.readouterr().out)
    told = exit_code_of(["verify", str(export)])

    assert (code, told, found["ok"], found["certificate"]) == (3, 3, False, None)
    assert found["problems"][0].endswith("certify again with --overwrite")
    assert certify(export, "--study", study)[0] == 1
    assert certify(export, "--study", study, "--overwrite")[0] == 0
    assert exit_code_of(["verify", str(export)]) == 0


def test_a_study_with_a_database_of_its_own_need_not_have_been_run(export, study, tmp_path, certify, capsys):
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    study.write_text(yaml.safe_dump({**STUDY, "store": str(tmp_path / "store"), "storage": url}))
    code, error = certify(export, "--study", study)
    config = load_study(study)
    used = StudyPrompts(calibration=("a cat",), search=load_heldout_prompts(config.certificate, tmp_path, NONE)[:1])
    create_study(tmp_path / "store", config, used, url=url)
    refused, told = certify(export, "--study", study, "--overwrite")
    optuna.storages.RDBStorage(url).engine.dispose()

    assert (code, refused) == (0, 1), error
    assert "served for search" in told


NONE = StudyPrompts(calibration=(), search=())


def test_held_out_prompts_that_differ_in_case_and_spaces_are_one(tmp_path, study):
    (tmp_path / "heldout.txt").write_text("a fox\na hen\nA  Fox\n")
    certificate = load_study(study).certificate.model_copy(update={"prompts": "heldout.txt", "num_prompts": 3})

    with pytest.raises(ValueError, match="differ by more than case and spaces, but 'a fox' stands there twice"):
        load_heldout_prompts(certificate, tmp_path, NONE)


def test_software_names_the_runtime_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr("hyquant.devices.runtime.version", {"torch_npu": "2.9.0"}.__getitem__)

    assert runtime_versions(torch.device("cuda")) == {"cuda": "12.8"}
    assert runtime_versions(SimpleNamespace(type="npu")) == {"torch_npu": "2.9.0"}
    assert runtime_versions(torch.device("cpu")) == {}
