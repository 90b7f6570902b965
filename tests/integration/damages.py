"""The table of damaged inputs: what is damaged and how, the command that meets it, and what its sentence must say.

A damage changes the folder that `good_inputs` wrote; commands run inside it, so files are named by relative paths.
"""

import hashlib
import io
import json
import os
import pickle
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Change = Callable[[Path], object]
WEIGHTS = "export/quant_model_weight_w8a8.safetensors"
DESCRIPTION = "export/quant_model_description_w8a8.json"
MANIFEST = "export/hyq_manifest.json"
FIRST, SECOND = (f"checkpoint/model-0000{index}-of-00002.safetensors" for index in (1, 2))
INDEX = "checkpoint/model.safetensors.index.json"
LAYER = "single_blocks.0.linear1"
PROJECTION = "double_blocks.0.img_attn_proj.weight"
RUN, NEW, STATUS, TRIAL = (
    "run study.yaml",
    "run study.yaml --store new",
    "status study.yaml",
    "trial study.yaml config.yaml",
)
VERIFY, PROFILE = "verify export", "profile --device-profile device.yaml"
QUANTIZE = "quantize-checkpoint --in checkpoint --out out --config config.yaml"
WITH_STATS = (
    "quantize-checkpoint --in checkpoint --out out --config static.yaml --stats stats.safetensors --dtype float32"
)


@dataclass(frozen=True)
class Damage:
    """One damaged input.

    Attributes:
        damage: Makes it, in a folder of good inputs.
        command: What the user types after `hyq-search`.
        words: What the sentence must contain: the place, the rule, the value, the way out.
        code: The exit code, as docs/cli.md has it.
    """

    damage: Change
    command: str
    words: tuple[str, ...]
    code: int = 1


class Bomb:
    """Makes a folder if it is unpickled, which is seen in the listing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it-ran",)


def written(name: str, content: str | bytes) -> Change:
    """Replace the content of a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def added(name: str, content: str) -> Change:
    """Append to a text file."""
    return lambda folder: (folder / name).write_text((folder / name).read_text() + content)


def cut(name: str, size: int) -> Change:
    """Keep the first bytes of a file."""
    return lambda folder: os.truncate(folder / name, size)


def lost(name: str) -> Change:
    """Delete a file."""
    return lambda folder: (folder / name).unlink()


def a_folder(name: str) -> Change:
    """Put a folder where a file should be."""
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def a_pipe(name: str) -> Change:
    """Put a named pipe, from which nothing ever comes, where a file should be."""
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def a_device(name: str) -> Change:
    """Put a link to a device that never ends where a file should be."""
    return lambda folder: ((folder / name).unlink(), (folder / name).symlink_to("/dev/zero"))


def huge(name: str, line: bytes) -> Change:
    """Fill a file with 100 MB of lines."""
    return written(name, line * (100_000_000 // len(line)))


def document(name: str, change: Callable[[Any], object]) -> Change:
    """Change a value inside a YAML or JSON file."""

    def damage(folder: Path) -> None:
        content = yaml.safe_load((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content))

    return damage


def study(**fields: object) -> Change:
    """Give fields of the study file other values."""
    return document("study.yaml", lambda content: content.update(fields))


def both(*changes: Change) -> Change:
    """Do several."""
    return lambda folder: [change(folder) for change in changes]


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change tensors of a file, and leave what else it says."""

    def damage(folder: Path) -> None:
        with safe_open(folder / name, "pt") as file:
            about = file.metadata()
        content = load_file(folder / name)
        change(content)
        (folder / name).unlink()  # it is mapped
        save_file(content, folder / name, metadata=about)
        (folder / name).chmod(0o640)

    return damage


def header(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of a safetensors file, and leave its data."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        length = int.from_bytes(content[:8], "little")
        table = json.loads(content[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def signed(folder: Path) -> None:
    """Write today's sizes and digests into the manifest, so that only the content is wrong."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    for name, info in manifest["files"].items():
        content = (path.parent / name).read_bytes()
        info |= {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def overlapping(table: dict[str, Any]) -> None:
    """Let the second tensor lie where the first one does."""
    first, second = [entry for name, entry in table.items() if name != "__metadata__"][:2]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]


def scales_become_nan(content: dict[str, torch.Tensor]) -> None:
    """Lose the scales of a layer's weights."""
    content[f"{LAYER}.deq_scale"] = torch.full_like(content[f"{LAYER}.deq_scale"], float("nan"))


def weight_becomes_float(content: dict[str, torch.Tensor]) -> None:
    """Store a layer's int8 weights as float32."""
    content[f"{LAYER}.weight"] = content[f"{LAYER}.weight"].float()


def lies_elsewhere(name: str) -> Change:
    """Move a file out of its folder and link to it."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder / "elsewhere")
        (folder / name).symlink_to(folder / "elsewhere")

    return damage


def sql(*statements: str) -> Change:
    """Change the study's database."""

    def damage(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "store/optuna.db")) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    return damage


def of_another_program(folder: Path) -> None:
    """Put the SQLite file of another program in the place of the study's database."""
    (folder / "store/optuna.db").unlink()
    sql("CREATE TABLE moz_places (id INTEGER PRIMARY KEY, url TEXT)")(folder)


def pickled(folder: Path) -> None:
    """Put a checkpoint beside the good one that runs code when it is unpickled."""
    torch.save({"double_blocks.0.img_mod.linear.weight": Bomb()}, folder / "bomb.pt")


def inflated(folder: Path) -> None:
    """Put a checkpoint beside the good one that is 100 kB and unpacks to 100 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": "x" * 100_000_000}, protocol=2))
        archive.writestr("archive/version", "3\n")
    (folder / "bomb.pt").write_bytes(buffer.getvalue())


def a_ladder(folder: Path) -> None:
    """Let the study ask for a ladder."""
    ladder = {"name": "stairs", "strategies": ["dynamic"], "exclusions": "ladder"}
    study(space=ladder)(folder)


def a_map(content: str) -> Change:
    """Let the study ask for a ladder and point to a map that holds something."""

    def damage(folder: Path) -> None:
        from search.prompts import load_prompts
        from search.sensitivity import MapOfStudy, digest, probed_part
        from search.study_file import load_study

        a_ladder(folder)
        config = load_study(folder / "study.yaml")
        part = digest(probed_part(config, load_prompts(config.workload, folder)))
        (folder / "store/sensitivity").mkdir()
        about = MapOfStudy(subject="0" * 16, part=part)
        (folder / "store/sensitivity/tiny-study.study").write_text(about.model_dump_json())
        (folder / f"store/sensitivity/{'0' * 16}.json").write_text(content)

    return damage


def nothing(folder: Path) -> None:
    """Leave the inputs as they are: the command line is what is wrong."""


def laughs() -> str:
    """Return a short text that stands for 43 million values."""
    rows = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    rows += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefg", "bcdefgh", strict=True)]
    return "\n".join(rows) + "\n"


def without(key: str) -> Callable[[dict[str, Any]], object]:
    """Delete a key of a mapping."""
    return lambda content: content.pop(key)


STUDY_FILES = {
    "a study file indented by tabs": Damage(
        written("study.yaml", "name: x\nmodel:\n\tkind: tiny\n"), RUN, ("study.yaml", "YAML", "line 3")
    ),
    "a study file with a bracket too few": Damage(
        added("study.yaml", "slots: [{ranks: 1}\n"), STATUS, ("study.yaml", "YAML", "line")
    ),
    "a study file that gives a field twice": Damage(
        added("study.yaml", "budget: {trials: 3}\nbudget: {trials: 300}\n"), RUN, ("study.yaml", "'budget'", "twice")
    ),
    "a study file that stands for millions of values": Damage(
        written("study.yaml", laughs()), RUN, ("study.yaml", "at most 100000 values", "shorten")
    ),
    "a study file with an unknown field": Damage(
        study(budjet={"trials": 3}), RUN, ("study.yaml", "budjet: unknown field", "did you mean 'budget'?")
    ),
    "a study file with a field of the wrong type": Damage(
        study(budget={"trials": "many"}), RUN, ("study.yaml", "budget.trials", "integer", "'many'")
    ),
    "a study file without a space": Damage(
        document("study.yaml", without("space")), RUN, ("study.yaml", "space must be", "add `space: mini`")
    ),
    "an empty study file": Damage(written("study.yaml", ""), RUN, ("study.yaml", "mapping", "empty")),
    "a study file in another encoding": Damage(
        written("study.yaml", "name: Prüfung".encode("utf-16")), RUN, ("study.yaml", "readable text", "UTF-8")
    ),
    "a folder for a study file": Damage(a_folder("study.yaml"), RUN, ("study.yaml", "file", "folder")),
    "a pipe for a study file": Damage(a_pipe("study.yaml"), RUN, ("study.yaml", "file")),
    "a device for a study file": Damage(a_device("study.yaml"), RUN, ("study.yaml", "file")),
    "a study file of 100 MB": Damage(huge("study.yaml", b"- name: x\n"), RUN, ("study.yaml", "at most", "MB")),
    "a study with no rank in its slots": Damage(study(slots="2 x 0"), RUN, ("study.yaml", "slots", "2 x 4", "'2 x 0'")),
    "a study whose slots name one device twice": Damage(
        study(slots=[{"devices": "0-1"}, {"devices": "1"}]),
        RUN,
        ("study.yaml", "must not share devices", "'1'", "one slot"),
    ),
    "a study whose slots have more ranks than devices": Damage(
        study(slots=[{"ranks": 4, "devices": "0-1"}]), RUN, ("study.yaml", "slots.0", "4 ranks share 2", "take fewer")
    ),
    "a study with devices that are no list": Damage(
        study(slots=[{"devices": "3-1"}]), RUN, ("study.yaml", "slots.0", "3-1")
    ),
    "a study with a timeout below zero": Damage(
        study(timeouts={"stages": {"render": -5}}),
        RUN,
        ("study.yaml", "timeouts.stages.render", "greater than 0", "-5"),
    ),
    "a study with a timeout for a stage that is none": Damage(
        study(timeouts={"stages": {"rendr": 5}}),
        RUN,
        ("study.yaml", "timeouts: stages must be", "'rendr'", "did you mean 'render'?"),
    ),
    "a study with a bound that is not a number": Damage(
        study(constraints=[{"metric": "collapsed", "max": float("nan")}]),
        RUN,
        ("study.yaml", "constraints.0.max", "finite number", "nan"),
    ),
    "a study whose slots choose code": Damage(
        study(slots=[{"environment": {"LD_PRELOAD": "/tmp/x.so"}}]), RUN, ("study.yaml", "must not set LD_*", "delete")
    ),
    "a study of an unknown kind of model": Damage(
        study(model={"kind": "tinny", "source": "0"}), NEW, ("'tinny'", "did you mean 'tiny'?")
    ),
    "a study on an unknown device": Damage(
        study(model={"kind": "tiny", "source": "0", "device": "tpu"}), NEW, ("'tpu'", "cpu")
    ),
    "a study of a model that is not there": Damage(
        study(model={"kind": "hunyuan_video", "source": "../models/none", "device": "cpu"}),
        "plan study.yaml",
        ("../models/none", "folder"),
    ),
    "a new study of a model that is not there": Damage(
        study(model={"kind": "hunyuan_video", "source": "../models/none", "device": "cpu"}),
        NEW,
        ("../models/none", "folder"),
    ),
    "a new study of a tiny model without a seed": Damage(
        study(model={"kind": "tiny", "source": "small", "device": "cpu"}), NEW, ("'small'", "seed")
    ),
    "a new study of a tiny model with a seed too large": Damage(
        study(model={"kind": "tiny", "source": "9" * 19, "device": "cpu"}), NEW, ("9" * 19, "2^63 - 1")
    ),
    "a study with a judge that is not there": Damage(
        study(judge={"model": "/models/judge"}), NEW, ("/models/judge", "must")
    ),
    "a study that keeps its store in a file": Damage(study(store="config.yaml"), RUN, ("config.yaml", "folder")),
}

SPACES = {
    "a space that is not there": Damage(
        study(space="../../space.yaml"), RUN, ("study.yaml", "../../space.yaml", "existing file", "correct the path")
    ),
    "a space whose range is upside down": Damage(
        both(
            document(
                "space.yaml", lambda space: space.update(timestep_sep_share={"low": 0.5, "high": 0.1, "step": 0.1})
            ),
            study(space="space.yaml"),
        ),
        RUN,
        ("space.yaml", "timestep_sep_share", "low=0.5 and high=0.1", "swap"),
    ),
    "a space with a strategy that is none": Damage(
        both(document("space.yaml", lambda space: space["strategies"].append("m5")), study(space="space.yaml")),
        RUN,
        ("space.yaml", "strategies", "m5"),
    ),
    "a preset with an exclusion set that is not there": Damage(
        both(
            document("space.yaml", lambda space: space["presets"][0]["params"].update(exclusion="sed")),
            study(space="space.yaml"),
        ),
        RUN,
        ("space.yaml", "preset 'timestep'", "'sed'", "did you mean 'seed'?"),
    ),
    "a pipe for a space": Damage(both(a_pipe("space.yaml"), study(space="space.yaml")), RUN, ("space.yaml", "file")),
    "a space whose ladder nobody measured": Damage(
        a_ladder, NEW, ("tiny-study", "no sensitivity map", "run hyq-search sensitivity first")
    ),
    "a sensitivity map cut short": Damage(
        a_map('{"subject": {"mod'), RUN, ("sensitivity map", "damaged", "run hyq-search sensitivity first")
    ),
    "a sensitivity map of a later version": Damage(
        a_map('{"rows": [], "version": 9}'), RUN, ("sensitivity map", "damaged", "run hyq-search sensitivity first")
    ),
}

CONFIGS = {
    "a config of an unknown scheme": Damage(
        written("config.yaml", "linear: {kind: w8a8_dinamic}\n"), TRIAL, ("config.yaml", "w8a8_dinamic", "w8a8_dynamic")
    ),
    "a config with a strength above one": Damage(
        written("config.yaml", "linear: {kind: w8a8_dynamic}\nsmoothing: {kind: m4, alpha: 7}\n"),
        TRIAL,
        ("config.yaml", "alpha", "less than or equal to 1", "7"),
    ),
    "a config with a misspelled field": Damage(
        written("config.yaml", "liner: {kind: w8a8_dynamic}\n"), QUANTIZE, ("config.yaml", "liner", "linear")
    ),
    "an empty config": Damage(written("config.yaml", ""), TRIAL, ("config.yaml", "mapping", "empty")),
    "a config of two documents": Damage(
        written("config.yaml", "linear: null\n---\nlinear: null\n"), QUANTIZE, ("config.yaml", "YAML", "document")
    ),
    "a pipe for a config": Damage(a_pipe("config.yaml"), TRIAL, ("config.yaml", "file")),
    "a config that gives a field twice": Damage(
        written("config.yaml", "linear: {kind: w8a8_dynamic, kind: w8a16}\n"),
        QUANTIZE,
        ("config.yaml", "'kind'", "twice"),
    ),
}

PROMPTS = {
    "an empty prompt file": Damage(
        written("search.txt", "\n \n"), RUN, ("3 prompts are asked of search.txt", "holds 0", "add some")
    ),
    "a prompt with a NUL": Damage(
        written("search.txt", b"a fox\0\na hen\na cow\n"), RUN, ("search.txt", "NUL", "a fox")
    ),
    "a prompt of 100 MB": Damage(huge("search.txt", b"a very long fox "), RUN, ("search.txt", "at most", "MB")),
    "prompts as JSON lines": Damage(
        written("search.txt", '{"prompt": "a fox"}\n{"prompt": "a hen"}\n{"prompt": "a cow"}\n'),
        RUN,
        ("search.txt", "a prompt a line", "JSON", '{"prompt": "a fox"}'),
    ),
    "a prompt file that repeats itself": Damage(
        written("calibration.txt", "a cat\na cat\n"), RUN, ("calibration.txt", "'a cat'", "twice", "delete one")
    ),
    "a folder for a prompt file": Damage(a_folder("calibration.txt"), RUN, ("calibration.txt", "file", "folder")),
    "a pipe for a prompt file": Damage(a_pipe("calibration.txt"), RUN, ("calibration.txt", "file")),
    "prompts in another encoding": Damage(
        written("search.txt", "ein Fuchs über\n".encode("latin-1")), RUN, ("search.txt", "readable text", "UTF-8")
    ),
    "held-out prompts that the search saw": Damage(
        written("heldout.txt", "A  Fox\nan ape\na bee\n"),
        "certify export --study study.yaml",
        ("held-out prompts must be new", "1 of 3 served for search", "'A  Fox'"),
    ),
}

DEVICES = {
    "a device profile with a misspelled field": Damage(
        document("device.yaml", lambda content: content.update(nmae="x")), PROFILE, ("device.yaml", "nmae")
    ),
    "a device profile without a field": Damage(
        document("device.yaml", without("name")), PROFILE, ("device.yaml", "name", "studies/devices")
    ),
    "a device profile that is no YAML": Damage(
        written("device.yaml", "name: 'Ascend\n"), PROFILE, ("device.yaml", "YAML", "line")
    ),
    "a device profile of a study that is not there": Damage(
        study(latency={"device_profile": "none.yaml"}), RUN, ("study.yaml", "latency.device_profile", "none.yaml")
    ),
    "a device for a device profile": Damage(a_device("device.yaml"), PROFILE, ("device.yaml", "file")),
}

EXPORTS = {
    "an export whose weights are cut short": Damage(cut(WEIGHTS, 500_000), VERIFY, ("w8a8.safetensors", "bytes"), 3),
    "an export whose weights were changed": Damage(
        header(WEIGHTS, lambda table: table.update(__metadata__={"format": "np"})), VERIFY, ("w8a8.safetensors",), 3
    ),
    "weights whose header is longer than the file": Damage(
        both(lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 7 + b"\0" + b"{}"), signed),
        VERIFY,
        ("w8a8.safetensors", "safetensors"),
        3,
    ),
    "weights whose tensors overlap": Damage(
        both(header(WEIGHTS, overlapping), signed), VERIFY, ("w8a8.safetensors", "safetensors"), 3
    ),
    "weights of another dtype": Damage(
        both(tensors(WEIGHTS, weight_becomes_float), signed), VERIFY, (f"{LAYER}.weight", "int8", "float32"), 3
    ),
    "scales that are not numbers": Damage(
        both(tensors(WEIGHTS, scales_become_nan), signed), VERIFY, (f"{LAYER}.deq_scale", "finite"), 3
    ),
    "a tensor too few": Damage(
        both(tensors(WEIGHTS, without(f"{LAYER}.deq_scale")), signed), VERIFY, (f"{LAYER}.deq_scale",), 3
    ),
    "a tensor too many": Damage(
        both(tensors(WEIGHTS, lambda content: content.update(stray=torch.ones(3))), signed), VERIFY, ("stray",), 3
    ),
    "a weight of another shape": Damage(
        both(
            tensors(WEIGHTS, lambda content: content.update({f"{LAYER}.weight": torch.ones(2, 2, dtype=torch.int8)})),
            signed,
        ),
        VERIFY,
        (f"{LAYER}.weight", "(2, 2)"),
        3,
    ),
    "a pipe for weights": Damage(a_pipe(WEIGHTS), VERIFY, ("w8a8.safetensors", "regular file"), 3),
    "an export without its description": Damage(lost(DESCRIPTION), VERIFY, ("description_w8a8.json", "missing"), 3),
    "a description that is no JSON": Damage(
        both(written(DESCRIPTION, "{'a': 1}"), signed), VERIFY, ("description_w8a8.json", "JSON"), 3
    ),
    "a manifest with another digest": Damage(
        document(MANIFEST, lambda content: next(iter(content["files"].values())).update(sha256="0" * 64)),
        VERIFY,
        ("SHA-256 of the manifest", "copy it again"),
        3,
    ),
    "a manifest cut short": Damage(cut(MANIFEST, 1000), VERIFY, ("hyq_manifest.json",), 3),
    "a manifest of a later version": Damage(
        document(MANIFEST, lambda content: content.update(format_version=99)), VERIFY, ("hyq_manifest.json", "99"), 3
    ),
    "a link out of the export": Damage(lies_elsewhere(WEIGHTS), VERIFY, ("w8a8.safetensors", "link"), 3),
    "an index that names an absent part": Damage(
        document(
            "parts/quant_model_weight_w8a8.safetensors.index.json",
            lambda content: content["weight_map"].update({f"{LAYER}.weight": "none.safetensors"}),
        ),
        "verify parts",
        ("index.json",),
        3,
    ),
    "an export with a part too few": Damage(
        lost("parts/quant_model_weight_w8a8-00001-of-00002.safetensors"),
        "verify parts",
        ("00001-of-00002", "missing"),
        3,
    ),
    "an export that is not there": Damage(nothing, "verify nowhere", ("nowhere",)),
    "a file for an export": Damage(nothing, "verify study.yaml", ("study.yaml", "folder")),
    "an empty export": Damage(lambda folder: (folder / "empty").mkdir(), "verify empty", ("empty",)),
    "a certificate that is none": Damage(
        written("export/certificate.json", "{}"), VERIFY, ("certificate.json", "certify again with --overwrite"), 3
    ),
    "rendering of damaged weights": Damage(
        cut(WEIGHTS, 500_000), "render export --prompt x --size 16x16 --frames 5", ("w8a8.safetensors",)
    ),
    "certifying of damaged weights": Damage(
        cut(WEIGHTS, 500_000), "certify export --study study.yaml", ("w8a8.safetensors",)
    ),
    "certifying by a study without margins": Damage(
        document("study.yaml", without("certificate")),
        "certify export --study study.yaml",
        ("tiny-study", "states none", "section `certificate`"),
    ),
    "repeating of a certificate that is not there": Damage(
        nothing, "certify export --again", ("export has none", "certify it with --study")
    ),
    "exporting of a trial that is not there": Damage(
        nothing, "export study.yaml --pick 99 --out out", ("tiny-study", "no trial 99", "hyq-search front")
    ),
    "exporting into a folder of other things": Damage(
        nothing, "export study.yaml --pick 0 --out store", ("store", "holds other things", "another path")
    ),
    "exporting of a study without a front": Damage(
        nothing, "export study.yaml --pick safe --out out", ("pick safe", "complete trial", "run it further")
    ),
}

CHECKPOINTS = {
    "a shard cut short": Damage(cut(FIRST, 9000), QUANTIZE, ("model-00001-of-00002", "bytes", "download it again")),
    "a shard too few": Damage(lost(SECOND), QUANTIZE, ("model-00002-of-00002", "complete the download")),
    "an index that names an absent shard": Damage(
        document(INDEX, lambda content: content["weight_map"].update({"img_in.proj.bias": "none.safetensors"})),
        QUANTIZE,
        ("none.safetensors", "complete the download"),
    ),
    "an index that is no JSON": Damage(
        written(INDEX, "<html>"), QUANTIZE, ("index.json", "weight_map", "download it again")
    ),
    "two indexes": Damage(
        lambda folder: (folder / "checkpoint/b.safetensors.index.json").write_bytes((folder / INDEX).read_bytes()),
        QUANTIZE,
        ("checkpoint", "one index", "b.safetensors.index.json"),
    ),
    "a shard whose header is longer than the file": Damage(
        written(FIRST, b"\xff\xff\xff\xff\0\0\0\0{}"), QUANTIZE, ("model-00001-of-00002", "download it again")
    ),
    "a shard whose tensors overlap": Damage(
        header(FIRST, overlapping), QUANTIZE, ("model-00001-of-00002", "one behind the other", "download it again")
    ),
    "a tensor of another shape": Damage(
        tensors(FIRST, lambda content: content.update({PROJECTION: torch.ones(3, 3).half()})),
        QUANTIZE,
        ("checkpoint", "other shapes", "attn.to_out", "belong together"),
    ),
    "weights that are integers": Damage(
        tensors(FIRST, lambda content: content.update({name: value.to(torch.int8) for name, value in content.items()})),
        QUANTIZE,
        ("I8", "float checkpoint"),
    ),
    "weights that are not numbers": Damage(
        tensors(FIRST, lambda content: content.update({n: v * float("nan") for n, v in content.items()})),
        QUANTIZE,
        ("checkpoint", "finite"),
    ),
    "a layer too few": Damage(
        both(
            tensors(FIRST, without(PROJECTION)), document(INDEX, lambda content: content["weight_map"].pop(PROJECTION))
        ),
        QUANTIZE,
        ("checkpoint", "lacks", "attn"),
    ),
    "an empty folder": Damage(
        lambda folder: (folder / "empty").mkdir(), QUANTIZE.replace("checkpoint --out", "empty --out"), ("empty",)
    ),
    "a pickle with code": Damage(
        pickled, QUANTIZE.replace("checkpoint --out", "bomb.pt --out"), ("bomb.pt", "tensors")
    ),
    "an archive that inflates": Damage(inflated, QUANTIZE.replace("checkpoint --out", "bomb.pt --out"), ("bomb.pt",)),
    "a pickle cut short": Damage(
        both(pickled, cut("bomb.pt", 300)),
        QUANTIZE.replace("checkpoint --out", "bomb.pt --out"),
        ("bomb.pt", "download it again"),
    ),
    "a pipe for a checkpoint": Damage(
        lambda folder: os.mkfifo(folder / "w.safetensors"),
        QUANTIZE.replace("checkpoint --out", "w.safetensors --out"),
        ("w.safetensors", "file"),
    ),
}

STATISTICS = {
    "statistics cut short": Damage(
        cut("stats.safetensors", 3000), WITH_STATS, ("stats.safetensors", "hyq-search calibrate")
    ),
    "statistics that are weights": Damage(
        lambda folder: (folder / "stats.safetensors").write_bytes((folder / FIRST).read_bytes()),
        WITH_STATS,
        ("stats.safetensors", "hyq-search calibrate"),
    ),
    "statistics of other weights": Damage(
        nothing, WITH_STATS, ("stats.safetensors", "64 input channels", "calibrate this model")
    ),
    "a pipe for statistics": Damage(a_pipe("stats.safetensors"), WITH_STATS, ("stats.safetensors", "file")),
    "statistics for a config that stores none": Damage(
        nothing, "calibrate study.yaml config.yaml --out s.safetensors", ("stores none",)
    ),
    "a calibrated file over another": Damage(
        nothing, "calibrate study.yaml static.yaml --out study.yaml", ("study.yaml", "exists already", "--overwrite")
    ),
}

STORES = {
    "a database cut short": Damage(cut("store/optuna.db", 5000), STATUS, ("store", "malformed")),
    "a database that is none": Damage(written("store/optuna.db", "x" * 5000), STATUS, ("store", "not a database")),
    "an empty database": Damage(written("store/optuna.db", ""), STATUS, ("holds no studies", "hyq-search run")),
    "a database of another program": Damage(of_another_program, STATUS, ("holds no studies", "hyq-search run")),
    "a database that may not be written": Damage(
        nothing, "run study.yaml --storage sqlite:///file:store/optuna.db?mode=ro&uri=true", ("readonly",)
    ),
    "a folder for a database": Damage(a_folder("store/optuna.db"), STATUS, ("store", "holds no studies")),
    "a database of an unknown kind": Damage(
        nothing, "status tiny-study --storage oracle://u@h/d", ("oracle://u@h/d", "postgresql://")
    ),
    "an address that is none": Damage(
        nothing, "status tiny-study --storage postgresql:/h/d", ("postgresql:/h/d", "correct")
    ),
    "an address with a port that is none": Damage(
        nothing,
        "status tiny-study --storage postgresql://u@h:port/d",
        ("u@h:port/d", "a number as PORT", "correct it"),
    ),
    "a run that would make its tables in a database of another program": Damage(
        of_another_program, RUN, ("optuna.db", "another program's tables (", "give another file")
    ),
    "a worker's tracking address whose password ends it early": Damage(
        nothing,
        "worker study.yaml --once --tracking-uri http://u:pa@ss@h:5000",
        ("http://", "PASSWORD", "correct it"),
    ),
    "a proxy's address that is none": Damage(nothing, "status tiny-study --storage grpc://h", ("grpc://h", "PORT")),
    "a study that is not there": Damage(
        nothing, "front tiny-studdy --store store", ("'tiny-studdy'", "did you mean 'tiny-study'?")
    ),
    "a store that is not there": Damage(nothing, "show tiny-study 0 --store nowhere", ("nowhere", "hyq-search run")),
    "a study of another program": Damage(
        sql("DELETE FROM study_user_attributes"), STATUS, ("tiny-study", "not made by hyq-search", "give another study")
    ),
    "a study whose stored config is damaged": Damage(
        sql("UPDATE study_user_attributes SET value_json = '{\"name\": 3}' WHERE key = 'study_config'"),
        "status tiny-study --store store",
        ("tiny-study", "put a copy of the database back"),
    ),
    "a study whose stored prompts were changed": Damage(
        sql("UPDATE study_user_attributes SET value_json = '{\"search\": []}' WHERE key = 'prompts'"),
        "worker tiny-study --store store",
        ("tiny-study", "prompts", "digest", "hyq-search run"),
    ),
    "a study whose stored config is no JSON": Damage(
        sql("UPDATE study_user_attributes SET value_json = '{' WHERE key = 'study_config'"),
        STATUS,
        ("tiny-study", "store", "put a copy of the database back"),
    ),
    "a trial whose config is damaged": Damage(
        sql("UPDATE trial_user_attributes SET value_json = '3' WHERE key = 'config'"),
        "show tiny-study 0 --store store",
        ("the config of trial 0", "put a copy of the database back"),
    ),
    "a trial that is not there": Damage(nothing, "show study.yaml 7", ("7", "tiny-study")),
    "explaining a pick that is none": Damage(nothing, "explain study.yaml best", ("'best'", "safe, balanced, fast")),
    "running again a trial of no study": Damage(
        nothing, "trial --from tiny-studdy 0 --store store", ("'tiny-studdy'", "did you mean 'tiny-study'?")
    ),
    "running again a trial that is not there": Damage(
        nothing, "trial --from study.yaml 77", ("number 77", "hyq-search status")
    ),
    "running again a trial that failed": Damage(
        nothing, "trial --from study.yaml 0", ("number 0", "hyq-search status")
    ),
    "running again a trial that is no number": Damage(
        nothing, "trial --from study.yaml best", ("'best'", "number of a trial")
    ),
    "a study file that was changed": Damage(
        study(judge={"model": "mini"}), "worker study.yaml", ("tiny-study", "judge", "hashing", "mini")
    ),
    "a worker of slots that are none": Damage(nothing, "worker study.yaml --slots 2x", ("'2x'", "2 x 4")),
    "a worker whose shared folder is a file": Damage(
        nothing, "worker study.yaml --shared config.yaml --once", ("config.yaml", "folder")
    ),
    "an MLflow database that is none": Damage(
        written("store/mlflow.db", "x" * 5000), RUN, ("mlflow.db", "MLflow's database", "put a copy of it back")
    ),
    "pages of an MLflow database that is none": Damage(
        written("store/mlflow.db", "x" * 5000),
        "ui study.yaml --port 5991",
        ("mlflow.db", "MLflow's database", "put a copy of it back"),
    ),
    "examining a damaged MLflow database": Damage(
        written("store/mlflow.db", "x" * 5000), "doctor study.yaml", ("MLflow", "not a database"), 3
    ),
    "examining a damaged cache": Damage(
        lambda folder: (
            (folder / "store/cache").mkdir(),
            (folder / "store/cache/key.json").write_text("{"),
            (folder / "store/cache/key.safetensors").write_text("x"),
        ),
        "doctor study.yaml",
        ("cache", "damaged", "--repair"),
        3,
    ),
    "examining a damaged database": Damage(
        cut("store/optuna.db", 5000), "doctor study.yaml", ("store", "malformed"), 3
    ),
    "cleaning a damaged database": Damage(
        written("store/optuna.db", "x" * 5000), "gc study.yaml --yes", ("store", "not a database")
    ),
    "pages of a store that is none": Damage(
        nothing, "ui study.yaml --store export", ("export", "mlflow.db", "hyq-search run")
    ),
    "an MLflow server's address that is none": Damage(study(tracking="htp//x"), RUN, ("tracking", "htp//x")),
}

DAMAGES: dict[str, Damage] = {
    **STUDY_FILES,
    **SPACES,
    **CONFIGS,
    **PROMPTS,
    **DEVICES,
    **EXPORTS,
    **CHECKPOINTS,
    **STATISTICS,
    **STORES,
}
