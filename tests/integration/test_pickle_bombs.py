"""A file or value that would run code, wherever one is read: the code does not run, and what it is is said or rebuilt.

Each row of `READERS` plants a bomb where users or an earlier process put a file, and reads it as the commands do.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
import yaml
from safetensors.torch import save_file

from hyquant.calibration.file import open_calibrated
from hyquant.calibration.records import INDEX, StoredRecords
from hyquant.calibration.store import Store
from hyquant.checkpoint.source import open_checkpoint
from hyquant.config import digest
from hyquant.errors import CalibrationError, ConfigError, ExportError
from hyquant.export import read_manifest, verify_export
from hyquant.kernels import selection
from hyquant.models import load_model, mini
from hyquant.models.checkpoints import read_checkpoint
from hyquant.sensitivity.files import Journal, load_map
from hyquant.session.loading import safe_torch_load
from hyquant.video.dump import Dump
from metrics.base import Sample
from metrics.embedders import load_embedder
from metrics.errors import MetricError, WeightsMissing
from metrics.registry import METRICS
from search.certificate import read_certificate
from search.cli import exit_code_of
from search.config_file import load_config, load_device_profile
from search.errors import SearchError, StoreError
from search.order import SlotState, read_state
from search.prompts import read_prompts
from search.samplers import SAMPLERS
from search.spool import Spool
from search.storage import float_results, open_study, stored_config, stored_prompts
from search.study_file import load_study
from search.trials import trial_result
from spaces.space import load_space
from tests.toys.published_weights import put_random_weights
from tools.export_original_layout import export_original
from tools.fuzz import seeds


class Bomb:
    """Unpickles by making a folder: harmless here, any command elsewhere."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def pickled(target):
    return pickle.dumps(Bomb(target), protocol=0)


def archive(target):
    """What torch.save writes: a pickle in a zip."""
    buffer = io.BytesIO()
    torch.save({"weight": Bomb(target)}, buffer)
    return buffer.getvalue()


def old_archive(target):
    """What torch.save wrote before 1.6."""
    buffer = io.BytesIO()
    torch.save({"weight": Bomb(target)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def array(target):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(target)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def tagged(target):
    """YAML that names a function to call."""
    return f"!!python/object/apply:os.mkdir ['{target}']\n".encode()


PAYLOADS: dict[str, tuple[Callable[[Path], bytes], Callable[[bytes], object]]] = {
    "pickle": (pickled, pickle.loads),
    "torch": (archive, lambda payload: torch.load(io.BytesIO(payload), weights_only=False)),
    "old torch": (old_archive, lambda payload: torch.load(io.BytesIO(payload), weights_only=False)),
    "numpy": (array, lambda payload: np.load(io.BytesIO(payload), allow_pickle=True)),
    "yaml": (tagged, yaml.unsafe_load),
}
"""How each bomb is made, and who would let it off."""


@pytest.fixture
def target(tmp_path):
    return tmp_path / "it-ran"


@pytest.mark.parametrize(("make", "trusting"), PAYLOADS.values(), ids=list(PAYLOADS))
def test_the_bomb_works(target, make, trusting):
    trusting(make(target))

    assert target.is_dir()


def written(path, payload):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)
    return path


def model_with(part, name):
    """Load the shipped model with a bomb in place of one component's weights."""

    def read(folder, payload):
        shutil.copytree(mini.WEIGHTS, folder / "model")
        for weights in (folder / "model" / part).glob("*.safetensors"):
            weights.unlink()
        written(folder / "model" / part / name, payload)
        load_model("hunyuan_video", str(folder / "model"))

    return read


def calibration_cache(folder, payload):
    """With the digest that whoever plants it can compute."""
    store = Store(folder)
    sha256 = hashlib.sha256(payload + digest({}, length=64).encode()).hexdigest()
    written(folder / "key.safetensors", payload)
    written(folder / "key.json", json.dumps({"sha256": sha256, "meta": {}}).encode())
    assert store.get("key") is None


def captured_inputs(folder, payload):
    name = hashlib.sha256(payload).hexdigest()
    packed = [{"mapping": {"step_index": 0, "prompt_index": 0, "inputs": {"mapping": {"x": {"tensor": name}}}}}]
    written(folder / f"{name}.safetensors", payload)
    written(folder / INDEX, json.dumps({"sha256": digest(packed, length=64), "records": packed}).encode())
    list(StoredRecords([folder]))


def statistics_metadata(folder, payload):
    save_file({}, folder / "stats.safetensors", {"hyq_calibration": payload.decode("latin-1")})
    open_calibrated(folder / "stats.safetensors")


def optimizer_states(folder, payload):
    """Beside weights, as DeepSpeed leaves them: they are not looked at."""
    torch.save({"module": {"b": torch.zeros(2)}}, folder / "mp_rank_00_model_states.pt")
    written(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", payload)
    assert set(read_checkpoint(folder)) == {"b"}


def export_with(name):
    """Replace one file of an export, and verify it."""

    def read(folder, payload):
        seeds.manifests(folder)
        written(next((folder / "export").glob(name)), payload)
        assert not verify_export(folder / "export").ok

    return read


def manifest(folder, payload):
    written(folder / "hyq_manifest.json", payload)
    read_manifest(folder)


def prompts(folder, payload):
    written(folder / "prompts.txt", payload)
    read_prompts("prompts.txt", folder)


def certificate(folder, payload):
    written(folder / "certificate.json", payload)
    read_certificate(folder)


def sensitivity(folder, payload):
    assert load_map(written(folder / "map.json", payload)) is None
    assert Journal(written(folder / "map.jsonl", payload)).measured == []


def spool(folder, payload):
    lying = Spool(folder, "demo")
    written(lying.folder / "00000000000000000000000001-trial-0" / "log.json", payload)
    assert list(lying.waiting()) == []


def slot_state(folder, payload):
    written(folder / "state.json", payload)
    assert read_state(folder) == SlotState()


def times_of_kernels(folder, payload):
    assert selection._read(written(folder / "times.json", payload)) == {}


def note_of_a_dump(folder, payload):
    dump = Dump(folder, rank=0, num_ranks=1)
    written(dump.note, payload)
    assert dump.problem({}) == "unreadable"


def judge(name):
    def read(folder, payload):
        shutil.copytree(str(files("metrics").joinpath("mini_judge")), folder / "judge")
        (folder / "judge" / "open_clip_model.safetensors").unlink()
        written(folder / "judge" / name, payload)
        load_embedder(str(folder / "judge"))

    return read


def a_study(folder):
    return optuna.create_study(study_name="demo", storage=f"sqlite:///{folder}/optuna.db")


def study_attributes(folder, payload):
    """Texts where we keep objects, as whoever may write to the database can put there."""
    study, text = a_study(folder), payload.decode("latin-1")
    for key in ("study_config", "prompts", "float_scores"):
        study.set_user_attr(key, text)
    opened = open_study(folder, "demo")
    for read in (stored_config, stored_prompts, float_results):
        with pytest.raises(StoreError, match="study 'demo'"):
            read(opened)


def trial_attributes(folder, payload):
    """The result of a trial, and what Optuna's samplers leave for themselves: CmaEs a pickle, in hex."""
    study, text = a_study(folder), payload.decode("latin-1")
    trial = study.ask()
    trial.set_user_attr("result", text)
    for key in ("cma:optimizer:0", "cma:attrs:0", "nsga2:generation", "nsga3:parent_cache:0"):
        study._storage.set_trial_system_attr(trial._trial_id, key, payload.hex())
        study._storage.set_study_system_attr(study._study_id, key, payload.hex())
    study.tell(trial, 1.0)
    for kind, build in SAMPLERS.items():
        opened = optuna.load_study(study_name="demo", storage=study._storage, sampler=build(0, 1))
        drawn = opened.ask()
        assert 0.0 <= drawn.suggest_float(f"x{kind}", 0.0, 1.0) <= 1.0
    with pytest.raises(StoreError, match="the result of trial 0"):
        trial_result(open_study(folder, "demo").trials[0])


def text_files(read):
    return lambda folder, payload: read(written(folder / "document.yaml", payload))


def torch_file(read, name="bomb.pt"):
    return lambda folder, payload: read(written(folder / name, payload))


def a_command(*words):
    def read(folder, payload):
        path = written(folder / "bomb.pt", payload)
        written(folder / "config.yaml", b"linear: {kind: w8a8_dynamic}\n")
        assert exit_code_of([word.format(bomb=path, folder=folder) for word in words]) in {1, 2, 3}

    return read


CHECKPOINT = ["quantize-checkpoint", "--config", "{folder}/config.yaml", "--out", "{folder}/out", "--in"]

Reader = Callable[[Path, bytes], object]
READERS: dict[str, tuple[str, type[Exception] | None, Reader]] = {
    "a dump of calibration data": ("torch", ConfigError, torch_file(safe_torch_load)),
    "an old dump of calibration data": ("old torch", ConfigError, torch_file(safe_torch_load)),
    "an array for a dump": ("numpy", ConfigError, torch_file(safe_torch_load, "data.npy")),
    "a calibration cache, a float clip, latents": ("pickle", None, calibration_cache),
    "a cache in torch's format": ("torch", None, calibration_cache),
    "captured inputs": ("pickle", CalibrationError, captured_inputs),
    "statistics": ("pickle", CalibrationError, torch_file(open_calibrated, "stats.safetensors")),
    "statistics in torch's format": ("torch", CalibrationError, torch_file(open_calibrated, "stats.safetensors")),
    "the metadata of statistics": ("yaml", CalibrationError, statistics_metadata),
    "the metadata of statistics, pickled": ("pickle", CalibrationError, statistics_metadata),
    "a checkpoint": ("torch", ConfigError, torch_file(read_checkpoint)),
    "an old checkpoint": ("old torch", ConfigError, torch_file(read_checkpoint)),
    "a checkpoint to be streamed": ("torch", ConfigError, torch_file(open_checkpoint)),
    "an old checkpoint to be streamed": ("old torch", ConfigError, torch_file(open_checkpoint)),
    "an array for a checkpoint": ("numpy", ConfigError, torch_file(open_checkpoint, "weights.npy")),
    "a checkpoint that says it is safetensors": ("torch", ConfigError, torch_file(open_checkpoint, "w.safetensors")),
    "optimizer states": ("torch", None, optimizer_states),
    "quantize-checkpoint --in": ("torch", None, a_command(*CHECKPOINT, "{bomb}")),
    "quantize-checkpoint --stats": (
        "torch",
        None,
        a_command(*CHECKPOINT, str(mini.WEIGHTS), "--stats", "{bomb}"),
    ),
    "weights of a denoiser": ("torch", ConfigError, model_with("transformer", "diffusion_pytorch_model.bin")),
    "weights of an autoencoder": ("torch", ConfigError, model_with("vae", "diffusion_pytorch_model.bin")),
    "weights of a text encoder": ("torch", ConfigError, model_with("text_encoder", "pytorch_model.bin")),
    "weights of the other text encoder": ("torch", ConfigError, model_with("text_encoder_2", "pytorch_model.bin")),
    "weights of a judge": ("torch", MetricError, judge("open_clip_pytorch_model.bin")),
    "old weights of a judge": ("old torch", MetricError, judge("open_clip_pytorch_model.bin")),
    "weights of a judge that say they are safetensors": ("torch", MetricError, judge("open_clip_model.safetensors")),
    "a study file": ("yaml", ConfigError, text_files(load_study)),
    "a pickle for a study file": ("pickle", ConfigError, text_files(load_study)),
    "a space": ("yaml", ConfigError, text_files(load_space)),
    "a config": ("yaml", ConfigError, text_files(load_config)),
    "a device profile": ("yaml", ConfigError, text_files(load_device_profile)),
    "prompts": ("torch", ConfigError, prompts),
    "run": ("pickle", None, a_command("run", "{bomb}")),
    "verify": ("torch", None, a_command("verify", "{bomb}")),
    "weights of an export": ("torch", None, export_with("*.safetensors")),
    "the description of an export": ("pickle", None, export_with("quant_model_description*.json")),
    "the manifest of an export": ("pickle", ExportError, manifest),
    "a certificate": ("pickle", SearchError, certificate),
    "a sensitivity map and its journal": ("pickle", None, sensitivity),
    "what waits for MLflow": ("pickle", None, spool),
    "the state of a slot": ("pickle", None, slot_state),
    "measured times of kernels": ("pickle", None, times_of_kernels),
    "the note of a sample_video dump": ("pickle", None, note_of_a_dump),
    "attributes of an Optuna study": ("pickle", None, study_attributes),
    "tagged attributes of an Optuna study": ("yaml", None, study_attributes),
    "attributes of an Optuna trial": ("pickle", None, trial_attributes),
}
"""The bomb, the error in a sentence (None: it counts as missing, or is reported), and who reads it."""


@pytest.mark.parametrize(("payload", "error", "read"), READERS.values(), ids=list(READERS))
def test_a_bomb_does_not_go_off(tmp_path, target, payload, error, read):
    content = PAYLOADS[payload][0](target)
    place = tmp_path / "place"
    place.mkdir()

    if error is None:
        read(place, content)
    else:
        with pytest.raises(error):
            read(place, content)

    assert not target.exists()


@pytest.mark.parametrize("metric", ["lpips", "dists"])
def test_weights_where_torch_hub_keeps_them_do_not_go_off(tmp_path, target, monkeypatch, metric):
    """torch.hub unpickles what it loads; the digest in a published name is too short to keep a forger out."""
    put_random_weights(tmp_path / "hub", monkeypatch)
    (weights,) = METRICS[metric].find_weights()
    weights.write_bytes(archive(target))
    video = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    with pytest.raises(WeightsMissing, match="tensors only"):
        METRICS[metric].function(Sample("a cone", video, video), None)

    assert not target.exists()


def code(target):
    return f"import os\nos.mkdir({str(target)!r})\n".encode()


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_code_beside_a_tokenizer_is_not_imported(tmp_path, target, layout, monkeypatch):
    """Nor is anybody asked whether it should be: answers that wait in a pipe would do."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    model = tmp_path / "model"
    if layout == "diffusers":
        shutil.copytree(mini.WEIGHTS, model)
    else:
        export_original("mini", model)
    path = model / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "Odd",
        "auto_map": {"AutoTokenizer": ["odd.Odd", "odd.Odd"]},
    }
    path.write_text(json.dumps(config))
    written(model / "tokenizer" / "odd.py", code(target))

    try_to_load(model)

    assert not target.exists()


def test_code_beside_a_component_is_not_imported(tmp_path, target, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(mini.WEIGHTS, model)
    path = model / "model_index.json"
    config = json.loads(path.read_text()) | {"vae": ["odd", "Odd"], "_class_name": ["odd", "Odd"]}
    path.write_text(json.dumps(config))
    for folder in (model, model / "vae"):
        written(folder / "odd.py", code(target))

    try_to_load(model)

    assert not target.exists()


def try_to_load(model):
    """Load a model, which may be refused or go without the part that is odd."""
    with contextlib.suppress(ConfigError):
        load_model("hunyuan_video", str(model))
