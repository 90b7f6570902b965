"""A streamed quantization writes what a loaded one writes, whatever the checkpoint looks like and whoever killed it."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file, save_file

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.file import CalibrationInfo, open_calibrated, save_calibrated
from hyquant.checkpoint import quantize_checkpoint
from hyquant.config import (
    M3,
    M4,
    M6,
    FA3Int8,
    LayerSelection,
    QuantConfig,
    W8A8Dynamic,
    W8A8Static,
    W8A8Timestep,
)
from hyquant.errors import CalibrationError, ConfigError, ExportError, LayerMatchError
from hyquant.export import model_info, save_quantized
from hyquant.export.resumable import attempt_place
from hyquant.models import load_model, mini
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import RenderSettings
from hyquant.models.fingerprint import denoiser_part
from hyquant.plan import build_plan
from hyquant.quantize import restore_
from tools.export_original_layout import export_original

SETTINGS = RenderSettings(height=32, width=32, num_frames=5, num_steps=3)
PROMPT = "a red circle moving left on a black background"
WEIGHTS = "diffusion_pytorch_model.safetensors"
DYNAMIC = QuantConfig(linear=W8A8Dynamic())
CONFIGS = {
    "dynamic": DYNAMIC,
    "some layers": QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(exclude=("*img_mod*", "*fc2*"))),
    "static": QuantConfig(linear=W8A8Static()),
    "timestep": QuantConfig(linear=W8A8Timestep(timestep_sep=1)),
    "fp16 deployment": QuantConfig(linear=W8A8Dynamic(), deploy_dtype="float16"),
    "m3 static": QuantConfig(linear=W8A8Static(), smoothing=M3()),
    "m4 dynamic": QuantConfig(linear=W8A8Dynamic(), smoothing=M4()),
    "m4 folded": QuantConfig(linear=W8A8Static(), smoothing=M4(placement="fold")),
    "m6 searched": QuantConfig(linear=W8A8Dynamic(), smoothing=M6()),
    "mean of smoothed": QuantConfig(linear=W8A8Static(act_method="mean_minmax"), smoothing=M4()),
    "attention": QuantConfig(linear=W8A8Dynamic(), attention=FA3Int8()),
}


@pytest.fixture(scope="module")
def model():
    return load_model("hunyuan_video", "mini", dtype="float32")


@pytest.fixture(scope="module")
def records(model):
    return capture_in_memory(model, [PROMPT], [1], SETTINGS)


@pytest.fixture(scope="module")
def stats_of(model, records, tmp_path_factory):
    """Return what calibration finds for a configuration, and the file of it; nothing is calibrated twice."""
    folder, made = tmp_path_factory.mktemp("stats"), {}

    def stats(name):
        if name not in made:
            config = CONFIGS[name]
            found = calibrate(model.denoiser, planned(model, config), records, model.clock)
            info = CalibrationInfo(
                config=config,
                num_steps=SETTINGS.num_steps,
                denoiser=denoiser_part(model.fingerprint()),
                dtype="float32",
            )
            path = folder / f"{name}.safetensors"
            save_calibrated(path, found, info)
            made[name] = found, path
        return made[name]

    return stats


@pytest.fixture(scope="module")
def loaded_export(model, stats_of, tmp_path_factory):
    """Return the export that a loaded model gives."""
    folder = tmp_path_factory.mktemp("loaded")

    def export(name, layout):
        plan, out = planned(model, CONFIGS[name]), folder / f"{name} {layout}"
        if out.exists():
            return out
        quantize_calibrated_(model.denoiser, plan, stats_of(name)[0], model.clock)
        try:
            save_quantized(model.denoiser, plan, out, model=model_info(model), layout=layout)
        finally:
            restore_(model.denoiser)
        return out

    return export


@pytest.fixture
def transformer(tmp_path):
    """The mini model's denoiser alone, in a folder of its own."""
    return shutil.copytree(mini.WEIGHTS / "transformer", tmp_path / "transformer")


def planned(model, config):
    blocks = attention_blocks(model.denoiser)
    return build_plan(model.groups(), config, num_steps=SETTINGS.num_steps, model="hunyuan_video", attentions=blocks)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the manifest, which says where the model came from."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "hyq_manifest.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def manifest(folder: Path) -> dict:
    found = json.loads((folder / "hyq_manifest.json").read_text())
    del found["model"]["source"]
    found["model"]["fingerprint"] = denoiser_part(found["model"]["fingerprint"])
    return {key: value for key, value in found.items() if not key.startswith("created")}


def stream(source, out, config=DYNAMIC, **options):
    return quantize_checkpoint(source, out, config, **{"num_steps": 3, "dtype": "float32"} | options)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_file_is_the_one_that_a_loaded_model_gives(name, layout, loaded_export, stats_of, tmp_path):
    expected = loaded_export(name, layout)
    stats = None if name in ("dynamic", "some layers", "fp16 deployment") else stats_of(name)[1]

    stream(mini.WEIGHTS, tmp_path / "out", CONFIGS[name], stats=stats, layout=layout)

    assert digests(tmp_path / "out") == digests(expected)
    assert manifest(tmp_path / "out") == manifest(expected)


def sharded(folder: Path) -> Path:
    """Split a denoiser's file in three by an index, with names out of order."""
    tensors = load_file(folder / WEIGHTS)
    parts = [dict(list(tensors.items())[first::3]) for first in range(3)]
    table = {}
    for number, part in enumerate(parts, start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00003.safetensors"
        save_file(part, folder / name)
        table |= dict.fromkeys(part, name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / WEIGHTS).unlink()
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The mini model in Tencent's layout."""
    folder = tmp_path_factory.mktemp("original") / "ckpts"
    export_original("mini", folder)
    return folder


def test_files_in_parts_give_the_same(transformer, loaded_export, tmp_path):
    stream(sharded(transformer), tmp_path / "out")

    assert digests(tmp_path / "out") == digests(loaded_export("dynamic", "original"))


def test_tencents_mapped_file_gives_the_same(originals, loaded_export, tmp_path):
    stream(originals, tmp_path / "out")

    assert digests(tmp_path / "out") == digests(loaded_export("dynamic", "original"))


def test_original_names_in_safetensors_give_the_same(originals, loaded_export, tmp_path):
    (states,) = originals.rglob("mp_rank_00_model_states.pt")
    tensors = torch.load(states, weights_only=True)["module"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = json.loads((mini.WEIGHTS / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"rope_dim_list": config["rope_axes_dim"]}))

    stream(tmp_path / "model.safetensors", tmp_path / "out")

    assert digests(tmp_path / "out") == digests(loaded_export("dynamic", "original"))


def test_statistics_come_back_as_they_were_saved(stats_of):
    found, path = stats_of("mean of smoothed")
    saved = open_calibrated(path).found

    assert saved.stats.keys() == found.stats.keys()
    assert saved.smoothed_stats.keys() == found.smoothed_stats.keys()
    for name, stats in found.stats.items():
        assert torch.equal(saved.stats[name].lo, stats.lo)
        assert torch.equal(saved.stats[name].hi, stats.hi)


RUN = """
import sys
from hyquant.checkpoint import quantize_checkpoint, stream
from hyquant.config import QuantConfig, W8A8Dynamic

source, out, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
note, count = stream.Attempt.note, 0

def noted(self, entry):
    global count
    note(self, entry)
    count += 1
    if count == stop:
        print("stopped", flush=True)
        sys.stdin.read()

stream.Attempt.note = noted
quantize_checkpoint(source, out, QuantConfig(linear=W8A8Dynamic()), num_steps=3, dtype="float32")
"""


@contextmanager
def stopped_after(units: int, source: Path, out: Path) -> Iterator[None]:
    """Quantize in a process of its own, which waits when so many units were written, and kill it in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(source), str(out), str(units)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        yield
    finally:
        process.kill()
        process.communicate()


def kill_after(units: int, source: Path, out: Path) -> None:
    """Quantize in a process of its own and kill it when so many units were written."""
    with stopped_after(units, source, out):
        pass


def test_a_killed_run_is_gone_on_with_and_ends_in_the_same_bytes(transformer, loaded_export, tmp_path):
    out = tmp_path / "out"
    kill_after(5, transformer, out)

    assert not out.exists()
    report = stream(transformer, out)

    assert report.resumed_units == 5
    assert report.units > 5
    assert digests(out) == digests(loaded_export("dynamic", "original"))
    assert not attempt_place(out).exists()


def test_what_was_damaged_after_a_kill_is_written_again(transformer, loaded_export, tmp_path):
    out = tmp_path / "out"
    kill_after(8, transformer, out)
    (partial,) = (attempt_place(out) / "export").glob("*.safetensors")
    with partial.open("r+b") as file:
        end = json.loads((attempt_place(out) / "journal.jsonl").read_text().splitlines()[4])["end"]
        file.seek(end - 3)
        file.write(b"???")

    report = stream(transformer, out)

    assert report.resumed_units == 3
    assert digests(out) == digests(loaded_export("dynamic", "original"))


def test_other_settings_after_a_kill_start_anew(transformer, loaded_export, tmp_path):
    out = tmp_path / "out"
    kill_after(5, transformer, out)

    report = stream(transformer, out, layout="diffusers")

    assert report.discarded
    assert report.resumed_units == 0
    assert digests(out) == digests(loaded_export("dynamic", "diffusers"))


def test_a_held_folder_is_not_written_by_a_second_process(transformer, tmp_path):
    out = tmp_path / "out"
    with (
        stopped_after(3, transformer, out),
        pytest.raises(ExportError, match="another process is writing"),
    ):
        stream(transformer, out)


MEASURE = """
import sys
from pathlib import Path

def held():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))

import diffusers.models.transformers.transformer_hunyuan_video
from hyquant.checkpoint import quantize_checkpoint
from hyquant.config import QuantConfig, W8A8Dynamic

before, peak = held(), 0

def look(done, total):
    global peak
    peak = max(peak, held())

quantize_checkpoint(sys.argv[1], sys.argv[2], QuantConfig(linear=W8A8Dynamic()), num_steps=3, on_progress=look)
print(peak - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """130 and 300 MB of weights, largest tensor 29 MB: the second may hold little more than the first."""
    grown = {}
    for blocks in (1, 4):
        folder = tmp_path / f"of {blocks}"
        size = {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": blocks, "num_single_layers": 1}
        sizes = size | {"num_refiner_layers": 1, "rope_axes_dim": (16, 24, 24), "text_embed_dim": 64}
        HunyuanVideoTransformer3DModel(**sizes, pooled_projection_dim=64).save_pretrained(folder)
        answer = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder), str(folder / "out")],
            capture_output=True,
            text=True,
            check=True,
        )
        grown[blocks] = int(answer.stdout)
    small, large = grown[1], grown[4]

    assert large < 2 * 29e6 + 500e6
    assert large < small + 60e6


def damage_header(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate((folder / WEIGHTS).stat().st_size - 1)


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["proj_out.weight"]
    save_file(tensors, folder / WEIGHTS)


def add_a_tensor(folder: Path) -> None:
    save_file({**load_file(folder / WEIGHTS), "lora.weight": torch.zeros(2, 2)}, folder / WEIGHTS)


def spoil_a_value(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["transformer_blocks.0.attn.to_q.weight"][3, 4] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def make_int8(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)
    save_file(tensors, folder / WEIGHTS)


def change_the_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:-1].contiguous()
    save_file(tensors, folder / WEIGHTS)


def lose_a_part(folder: Path) -> None:
    (sharded(folder) / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()


def spoil_the_index(folder: Path) -> None:
    (sharded(folder) / f"{WEIGHTS}.index.json").write_text("{}")


def misplace_in_the_index(folder: Path) -> None:
    index = sharded(folder) / f"{WEIGHTS}.index.json"
    table = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(table.values()))[:2]
    index.write_text(json.dumps({"weight_map": {name: second if at == first else at for name, at in table.items()}}))


def lose_the_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def be_another_class(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')


def write_an_old_pt(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.pt", _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (damage_header, ConfigError, "must have .* bytes by its header"),
        (drop_a_tensor, LayerMatchError, r"lacks proj_out.weight \(1 in all\)"),
        (add_a_tensor, LayerMatchError, "also holds lora.weight"),
        (change_the_shape, LayerMatchError, "has other shapes of proj_out.weight"),
        (spoil_a_value, ConfigError, "transformer_blocks.0.attn.to_q.weight holds nan or inf"),
        (make_int8, ConfigError, "holds I8; give the float checkpoint"),
        (lose_a_part, ConfigError, "complete the download"),
        (spoil_the_index, ConfigError, "weight_map"),
        (misplace_in_the_index, ConfigError, "must hold the tensors that the index lists"),
        (lose_the_config, ConfigError, "does not exist; give the denoiser's folder"),
        (be_another_class, ConfigError, "is of FluxTransformer2DModel"),
        (write_an_old_pt, ConfigError, "damaged or older"),
    ],
)
def test_a_bad_checkpoint_is_refused_in_a_sentence_and_leaves_nothing(spoil, error, said, transformer, tmp_path):
    spoil(transformer)

    with pytest.raises(error, match=said) as caught:
        stream(transformer, tmp_path / "out")

    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


def test_statistics_are_asked_for_before_anything_is_written(transformer, tmp_path):
    with pytest.raises(CalibrationError, match="hyq-search calibrate"):
        stream(transformer, tmp_path / "out", CONFIGS["static"])

    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (CONFIGS["static"], {"num_steps": 4}, "as many steps as the plan, 4"),
        (CONFIGS["static"], {"dtype": "bfloat16"}, "give --dtype float32"),
        (CONFIGS["m6 searched"], {}, "they were not|searched|was made for another"),
    ],
)
def test_statistics_of_something_else_are_refused(config, options, said, transformer, stats_of, tmp_path):
    with pytest.raises(CalibrationError, match=said):
        stream(transformer, tmp_path / "out", config, stats=stats_of("static")[1], **options)

    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


def test_scales_searched_for_one_smoothing_are_not_used_for_another(transformer, loaded_export, stats_of, tmp_path):
    stream(transformer, tmp_path / "out", CONFIGS["m4 dynamic"], stats=stats_of("m3 static")[1])

    assert digests(tmp_path / "out") == digests(loaded_export("m4 dynamic", "original"))


def test_statistics_of_other_weights_are_refused_and_leave_nothing(transformer, stats_of, tmp_path):
    tensors = load_file(transformer / WEIGHTS)
    tensors["proj_out.weight"] *= 2
    save_file(tensors, transformer / WEIGHTS)

    with pytest.raises(CalibrationError, match="of the weights that are quantized"):
        stream(transformer, tmp_path / "out", CONFIGS["static"], stats=stats_of("static")[1])

    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 64])
def test_a_file_that_holds_no_statistics_is_named(content, transformer, tmp_path):
    (tmp_path / "stats.safetensors").write_bytes(content)

    with pytest.raises(CalibrationError, match="must be a file that hyq-search calibrate wrote"):
        stream(transformer, tmp_path / "out", CONFIGS["static"], stats=tmp_path / "stats.safetensors")
