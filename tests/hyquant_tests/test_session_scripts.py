"""Scripts of the session API, with imports, calls and keywords of msModelSlim's three samples: from dump to files."""

import json
import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file

from hyquant import TimestepManager, load_quantized, quant_model, safe_torch_load
from hyquant.clock import StepClock
from hyquant.modules.swap import attention_tensors, quantized_tensors
from tests.toys.pipelines import first_tensor, load_pipeline
from tests.toys.ranks import ROOT, run_ranks

SCRIPTS = ROOT / "tests" / "session_scripts"
CASES = {
    "timestep": ("timestep", [], "w8a8_timestep"),
    "fa3": ("fa3", [], "w8a8_dynamic"),
    "m3": ("smoothing", ["m3"], "w8a8_dynamic"),
    "m4": ("smoothing", ["m4"], "w8a8_dynamic"),
    "m6": ("smoothing", ["m6"], "w8a8_dynamic"),
}

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")


def run_script(name, args, monkeypatch):
    """Run a script in this process; return its global names."""
    monkeypatch.setattr(sys, "argv", [name, *args])
    return runpy.run_path(str(SCRIPTS / f"{name}.py"))


def first_call(pipeline, step_index):
    """What the denoiser gives for one input at a step."""
    TimestepManager.set_timestep_idx(step_index)
    with torch.no_grad():
        return first_tensor(pipeline.transformer(*pipeline.inputs(7, "another prompt")))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("case", CASES)
def test_a_script_quantizes_saves_and_its_files_load_bit_by_bit(layout, case, tmp_path, monkeypatch):
    script, rest, kind = CASES[case]
    expected = load_pipeline(layout)
    before = first_call(expected, 3)

    names = run_script(script, [layout, str(tmp_path), *rest], monkeypatch)
    out = tmp_path / "safe_tensor"
    clock = StepClock()
    loaded = load_pipeline(layout)
    load_quantized(loaded.transformer, out, clock)
    results = []
    for step_index in (0, 3):
        clock.set(step_index)
        results.append((first_call(names["pipeline"], step_index), first_call(loaded, step_index)))

    description = json.loads((out / f"quant_model_description_{kind}.json").read_text())
    assert description["model_quant_type"] == kind.upper()
    assert load_file(out / f"quant_model_weight_{kind}.safetensors").keys() == {
        key for key in description if not key.endswith("quant_type")
    }
    for quantized, again in results:
        assert torch.equal(quantized, again)
        assert not torch.equal(quantized, before)
        torch.testing.assert_close(quantized, before, rtol=0, atol=0.2 * before.abs().max().item())
    assert not torch.equal(results[0][0], results[1][0]) or case != "timestep"


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_what_the_script_disables_stays_in_float_and_the_rest_does_not(layout, tmp_path, monkeypatch):
    """The globs of the script are meant for original names, and find the same layers in diffusers' layout."""
    run_script("timestep", [layout, str(tmp_path)], monkeypatch)

    description = json.loads((tmp_path / "safe_tensor/quant_model_description_w8a8_timestep.json").read_text())
    quantized = {key.rpartition(".")[0] for key, kind in description.items() if kind == "W8A8_TIMESTEP"} - {""}
    blocks = [
        f"double_blocks.{index}.{stream}_{part}"
        for index in range(2)
        for stream in ("img", "txt")
        for part in ("attn_qkv", "attn_proj", "mlp.fc1")
    ]
    others = [f"double_blocks.{index}.txt_mod.linear" for index in range(2)]
    singles = [f"single_blocks.{index}.{part}" for index in range(2) for part in ("linear1", "linear2")]
    assert quantized == {*blocks, *others, *singles}


def test_a_dump_that_is_there_is_used_again(tmp_path, monkeypatch):
    run_script("fa3", ["original", str(tmp_path)], monkeypatch)
    dump = tmp_path / "cache/calib_data.pth"
    written = dump.stat().st_mtime_ns
    (tmp_path / "safe_tensor").rename(tmp_path / "first")

    run_script("fa3", ["original", str(tmp_path)], monkeypatch)

    assert dump.stat().st_mtime_ns == written
    name = "quant_model_weight_w8a8_dynamic.safetensors"
    assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "safe_tensor" / name).read_bytes()


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("layout", "case"),
    [("original", "timestep"), ("diffusers", "timestep"), ("original", "fa3"), ("diffusers", "m6"), ("original", "m3")],
)
def test_two_ranks_write_a_pair_each_of_what_the_calls_of_both_give(layout, case, tmp_path, monkeypatch):
    """Compared with one process that has both ranks' dumps: the same tensors, bit by bit."""
    script, rest, kind = CASES[case]
    run_ranks([str(SCRIPTS / f"{script}.py"), layout, str(tmp_path), *rest])
    out = tmp_path / "safe_tensor"
    calls = [safe_torch_load(tmp_path / f"cache/calib_data_{rank}.pth") for rank in range(2)]

    alone = tmp_path / "alone"
    names = run_script(script, [layout, str(alone), *rest], monkeypatch)
    session = names["session_cfg"]
    processors = {key: value for key, value in session.processor_cfg_map.items() if key != "save"}
    quant_model(
        names["model"],
        session.model_copy(update={"calib_data": calls[0] + calls[1], "processor_cfg_map": processors}),
    )
    clock, loaded = StepClock(), load_pipeline(layout).transformer
    load_quantized(loaded, out, clock)

    pairs = [out / f"quant_model_weight_{kind}_{rank}.safetensors" for rank in range(2)]
    assert sorted(file.name for file in out.iterdir()) == sorted(
        ["hyq_manifest.json"]
        + [pair.name for pair in pairs]
        + [f"quant_model_description_{kind}_{rank}.json" for rank in range(2)]
    )
    assert pairs[0].read_bytes() == pairs[1].read_bytes()
    assert not torch.equal(*(torch.as_tensor(first_latents(entries[0])) for entries in calls))
    for held in (quantized_tensors, attention_tensors):
        expected, found = held(names["model"]), held(loaded)
        assert found.keys() == expected.keys()
        for path, tensors in expected.items():
            assert all(torch.equal(found[path][name], tensor) for name, tensor in tensors.items()), path


def first_latents(entry):
    return (entry["args"] if isinstance(entry, dict) else entry)[0]
