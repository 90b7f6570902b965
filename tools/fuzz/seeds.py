"""Good files to start from: what the project ships, and small ones of each kind made with the tiny model."""

import io
import json
import os
import pickle
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.file import CalibrationInfo, save_calibrated
from hyquant.calibration.store import Store
from hyquant.config import M4, FA3Fp8, LayerSelection, QuantConfig, W8A8Timestep
from hyquant.export import model_info, save_quantized
from hyquant.export.manifest import ExportManifest
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import RenderSettings
from hyquant.models.tiny import TinyVideoModel
from hyquant.plan import build_plan
from hyquant.quantize import restore_
from hyquant.sensitivity.map import SensitivityMap
from search.certificate import Certificate, Pair, Software
from search.judging import Scores, judged
from search.margins import Margin
from search.study import JudgeConfig

ROOT = Path(__file__).parents[2]
STEPS = 2
_CONFIG = QuantConfig(
    linear=W8A8Timestep(timestep_sep=1),
    smoothing=M4(),
    attention=FA3Fp8(),
    layers=LayerSelection(exclude=("*img_mod*", "*modulation*")),
)
_WEIGHTS = {"double_blocks.0.img_mlp.fc1.weight": torch.zeros(2, 4), "b": torch.zeros(3)}
_LAUGHS = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (new, new, b", ".join([b"*%c" % old] * 9))
    for old, new in zip(b"abcdefgh", b"bcdefghi", strict=True)
)


BOMB_FOLDER = Path(tempfile.gettempdir()) / f"hyq-bomb-{os.getuid()}"


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(BOMB_FOLDER),)


def studies(folder: Path) -> list[bytes]:
    (folder / "prompts").mkdir(exist_ok=True)
    for path in (ROOT / "studies/prompts").iterdir():
        (folder / "prompts" / path.name).write_bytes(path.read_bytes())
    (folder / "devices").mkdir(exist_ok=True)
    for path in (ROOT / "studies/devices").iterdir():
        (folder / "devices" / path.name).write_bytes(path.read_bytes())
    rich = b'slots: "2 x 1"\nstorage: postgresql://u:p@h/d\nrungs: {prompts: [4], alpha: 0.01}\nsampler: {kind: gp}\n'
    found = [path.read_bytes() for path in sorted((ROOT / "studies").glob("*.yaml"))]
    mini = (ROOT / "studies/mini.yaml").read_bytes()
    return [*found, mini + rich if b"\nslots" not in mini else mini]


def study_texts(folder: Path) -> list[bytes]:
    return [*studies(folder), _LAUGHS, b"name: x\nspace: " + b"[" * 500]


def spaces(folder: Path) -> list[bytes]:
    return [*(path.read_bytes() for path in sorted((ROOT / "spaces/presets").glob("*.yaml")))]


def space_texts(folder: Path) -> list[bytes]:
    return [*spaces(folder), _LAUGHS]


def configs(folder: Path) -> list[bytes]:
    return [_CONFIG.model_dump_json().encode(), b"linear: {kind: w4a16, group_size: 0}\nattention: {kind: fa3_int8}\n"]


def device_profiles(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "studies/devices").glob("*.yaml"))]


@cache
def _exported(folder: Path) -> Path:
    """Make an export, the same without a manifest, and its statistics."""
    model = TinyVideoModel(0)
    settings = RenderSettings(height=32, width=32, num_frames=1, num_steps=STEPS)
    records = capture_in_memory(model, ["a red square moving left on a black background"], [0], settings)
    plan = build_plan(model.groups(), _CONFIG, num_steps=STEPS, attentions=attention_blocks(model.denoiser))
    found = calibrate(model.denoiser, plan, records, model.clock)
    info = CalibrationInfo(config=_CONFIG, num_steps=STEPS, denoiser="0" * 16, dtype="float32")
    save_calibrated(folder / "stats.safetensors", found, info)
    quantize_calibrated_(model.denoiser, plan, found, model.clock)
    for name in ("export", "foreign"):
        save_quantized(model.denoiser, plan, folder / name, model=model_info(model))
    restore_(model.denoiser)
    (folder / "foreign" / "hyq_manifest.json").unlink()
    return folder


def manifests(folder: Path) -> list[bytes]:
    return [(_exported(folder) / "export" / "hyq_manifest.json").read_bytes()]


def descriptions(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in (_exported(folder) / "foreign").glob("*.json")]


def export_weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in (_exported(folder) / "foreign").glob("*.safetensors")]


def statistics(folder: Path) -> list[bytes]:
    return [(_exported(folder) / "stats.safetensors").read_bytes()]


def checkpoints(folder: Path) -> list[bytes]:
    return [save(_WEIGHTS), save({"b": torch.zeros(())}), save({})]


def headers(folder: Path) -> list[bytes]:
    return [payload[8 : 8 + int.from_bytes(payload[:8], "little")] for payload in checkpoints(folder)]


def pickles(folder: Path) -> list[bytes]:
    found = []
    for content in (_WEIGHTS, {"module": _WEIGHTS}, {"module": Bomb()}, [1, "x"], torch.zeros(2)):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        found.append(buffer.getvalue())
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    return [*found, bomb.getvalue(), pickle.dumps(Bomb())]


def indexes(folder: Path) -> list[bytes]:
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "parts" / "one.safetensors").write_bytes(save(_WEIGHTS))
    return [json.dumps({"weight_map": dict.fromkeys(_WEIGHTS, "one.safetensors"), "metadata": {}}).encode()]


def entries(folder: Path) -> list[bytes]:
    Store(folder / "made").put("key", _WEIGHTS, {"a": 1})
    meta, tensors = ((folder / "made" / f"key.{kind}").read_bytes() for kind in ("json", "safetensors"))
    return [meta + b"\n" + tensors]


def certificates(folder: Path) -> list[bytes]:
    manifest = ExportManifest.model_validate_json(manifests(folder)[0])
    unjudged = Certificate(
        verdict="INCONCLUSIVE",
        new_prompts=None,
        metrics=(),
        alpha=0.05,
        study="demo",
        created="2026-01-02T03:04:05+00:00",
        pairs=tuple(Pair(prompt=f"prompt {index}", seed=index) for index in range(4)),
        prompts_digest="0" * 16,
        settings=RenderSettings(height=32, width=32, num_frames=1, num_steps=STEPS),
        judge=JudgeConfig(model="mini"),
        model=manifest.model,
        config=manifest.config,
        software=Software(packages={"torch": "2"}, device="cpu", kernels=("reference",)),
        files={name: info.sha256 for name, info in manifest.files.items()},
    )
    scores = Scores(
        values={"clip_prompt": [0.9, 0.8, 0.9, 0.8]},
        float_values={"clip_prompt": [0.9, 0.9, 0.8, 0.8]},
        kernels=("reference",),
    )
    found = judged(unjudged, (Margin(metric="clip_prompt", loss=0.02),), scores)
    return [found.model_dump_json().encode()]


def maps(folder: Path) -> list[bytes]:
    subject = {
        "model": "f00", "dtype": "float32", "device": "cpu", "scheme": {"kind": "w8a8_dynamic"}, "prompts": "0" * 16,
        "num_prompts": 1, "num_steps": 2, "ranges": [{"first": 0, "last": 1, "probed": [0]}], "bands": [],
    }  # fmt: skip
    row = {"block": "b.0", "kind": "k", "first_step": 0, "last_step": 1, "relative_l2": 0.1}
    document = {"subject": subject, "rows": [row], "keeps_blocks": True, "cost": {"whole": 1, "kept": 1}, "seconds": 0}
    SensitivityMap.model_validate(document)
    line = {"prompt_index": 0, "step_index": 0, "block": "b.0", "kind": "k", "error": 0.1, "reference": 1.0}
    return [json.dumps(document).encode(), json.dumps(line).encode()]
