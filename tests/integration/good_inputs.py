"""One folder of good inputs of every kind, made with the tiny model: what the damaged ones are made of."""

import json
import shutil
from pathlib import Path

import yaml
from optuna.trial import TrialState, create_trial
from safetensors.torch import save_file

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.file import CalibrationInfo, save_calibrated
from hyquant.config import LayerSelection, QuantConfig, W8A8Dynamic, W8A8Static, digest
from hyquant.export import model_info, save_quantized
from hyquant.models import load_model
from hyquant.models.base import RenderSettings
from hyquant.plan import build_plan
from hyquant.quantize import restore_
from search.mlflow_client import prepare_store
from search.prompts import load_prompts
from search.storage import create_study
from search.study_file import load_study
from search.tracking import Tracker
from tests.toys.original_dit import ToyOriginalDiT, ToySize
from tests.toys.tiny_study import TINY_STUDY

ROOT = Path(__file__).parents[2]
STATIC = QuantConfig(linear=W8A8Static(), layers=LayerSelection(include=("*single_blocks.0*",)))
CERTIFICATE = {"prompts": "heldout.txt", "num_prompts": 3, "margins": [{"metric": "psnr_db", "min": 30}]}
STUDY = TINY_STUDY | {"store": "store", "certificate": CERTIFICATE}
PROMPTS = {
    "calibration.txt": "a cat\na dog\n",
    "search.txt": "a fox\na hen\na cow\n",
    "heldout.txt": "an owl\nan ape\na bee\n",
}


def write_good_inputs(folder: Path) -> None:
    """Write a study file, prompts, configs, a space, a store with both databases, exports, statistics and weights."""
    for name, text in PROMPTS.items():
        (folder / name).write_text(text)
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    (folder / "config.yaml").write_text("linear: {kind: w8a8_dynamic}\n")
    (folder / "static.yaml").write_text("linear: {kind: w8a8_static}\nlayers: {include: ['*single_blocks.0*']}\n")
    shutil.copy(ROOT / "spaces/presets/mini.yaml", folder / "space.yaml")
    shutil.copy(ROOT / "studies/devices/ascend_910b.yaml", folder / "device.yaml")
    _write_store(folder)
    _write_exports(folder)
    _write_checkpoint(folder / "checkpoint")


def _write_store(folder: Path) -> None:
    store, config = folder / "store", load_study(folder / "study.yaml")
    prepare_store(store)
    study, _ = create_study(store, config, load_prompts(config.workload, folder))
    point = QuantConfig(linear=W8A8Dynamic())
    known = {"config": point.model_dump(mode="json"), "config_digest": digest(point)}
    Tracker.of(store, study).open_study(config)
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={**known, "reason": "out of memory"}))


def _write_exports(folder: Path) -> None:
    model = load_model("tiny", "0", device="cpu")
    settings = RenderSettings(height=16, width=16, num_frames=5, num_steps=2)
    records = capture_in_memory(model, ["a cat"], [0], settings)
    plan = build_plan(model.groups(), STATIC, num_steps=2)
    found = calibrate(model.denoiser, plan, records, model.clock)
    info = CalibrationInfo(config=STATIC, num_steps=2, denoiser="0" * 16, dtype="float32")
    save_calibrated(folder / "stats.safetensors", found, info)
    quantize_calibrated_(model.denoiser, plan, found, model.clock)
    save_quantized(model.denoiser, plan, folder / "export", model=model_info(model))
    save_quantized(model.denoiser, plan, folder / "parts", model=model_info(model), part_size_bytes=300_000)
    restore_(model.denoiser)


def _write_checkpoint(folder: Path) -> None:
    """Write a small denoiser in Tencent's names as two shards with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"rope_dim_list": [8, 12, 12]}))
    weights = ToyOriginalDiT(ToySize()).half().state_dict()
    names = sorted(weights)
    table = {}
    for index, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{index}-of-00002.safetensors"
        save_file({name: weights[name].contiguous() for name in part}, folder / shard)
        table |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table, "metadata": {}}))
