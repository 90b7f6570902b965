"""`SessionConfig` and `quant_model`: what is refused when, what is composed, and what a quantized model does."""

import json
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from pydantic import BaseModel
from torch import nn

import hyquant
from hyquant import (
    FA3ProcessorConfig,
    M3ProcessorConfig,
    M4ProcessorConfig,
    M6Config,
    M6ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    TimestepManager,
    W8A8DynamicProcessorConfig,
    W8A8DynamicQuantConfig,
    W8A8ProcessorConfig,
    W8A8QuantConfig,
    W8A8TimeStepProcessorConfig,
    W8A8TimeStepQuantConfig,
    quant_model,
)
from hyquant.clock import StepClock
from hyquant.errors import CalibrationError, ConfigError, ExportError, LayerMatchError
from hyquant.export import read_manifest
from hyquant.modules.linear import QuantLinear
from hyquant.modules.swap import attention_tensors, quantized_tensors, restore_, swapped
from tests.toys.pipelines import first_tensor, load_pipeline

DYNAMIC = {"w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=[])}
EMPTY_CALL = [[torch.zeros(1)]]


class Net(nn.Module):
    """Anything with Linears."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, scale=1.0):
        return self.last(torch.relu(self.first(x))) * scale


def x_of(seed):
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))


def steps(count):
    return [{"timestep_idx": index, "args": [x_of(index) * (1 + index)], "kwargs": {}} for index in range(count)]


def timestep(sep, **cfg):
    return {
        "w8a8_timestep": W8A8TimeStepProcessorConfig(
            cfg=W8A8TimeStepQuantConfig(**cfg), disable_names=[], timestep_sep=sep
        )
    }


def quantize(model, processors, calls, **rest):
    return quant_model(model, SessionConfig(processor_cfg_map=processors, calib_data=calls, device="cpu", **rest))


def calls_of(layout):
    """Five positional calls of a pipeline's denoiser, and the same with their steps."""
    pipeline = load_pipeline(layout)
    dumpers = [hyquant.DumperManager(pipeline.transformer, capture_mode=mode) for mode in ("args", "timestep")]
    pipeline("a paper boat", 3)
    return [dumper.records for dumper in dumpers]


@pytest.fixture(scope="module", params=["original", "diffusers"])
def dumped(request):
    return request.param, *calls_of(request.param)


REFUSED = {
    "unknown key": ({"w8a8_dynamics": None}, [], r"keys among m3, m4, m6, .*but got 'w8a8_dynamics'; did you mean"),
    "config of another key": ({"m4": M3ProcessorConfig()}, [], r"'m4' of .* must be a M4ProcessorConfig, but got a M3"),
    "two quantizers": (
        DYNAMIC | {"w8a8": W8A8ProcessorConfig()},
        EMPTY_CALL,
        r"must have one quantizer, but got w8a8 and w8a8_dynamic",
    ),
    "two smoothings": (
        DYNAMIC | {"m3": M3ProcessorConfig(), "m4": M4ProcessorConfig()},
        EMPTY_CALL,
        r"must have one smoothing, but got m3 and m4",
    ),
    "attention alone": ({"fa3": FA3ProcessorConfig()}, EMPTY_CALL, r"must have one quantizer, but got none; give one"),
    "static without calls": ({"w8a8": W8A8ProcessorConfig()}, [], r"w8a8 must be calibrated with calls"),
    "smoothing without calls": (DYNAMIC | {"m4": M4ProcessorConfig()}, None, r"w8a8_dynamic, m4 must be calibrated"),
    "time steps without steps": (timestep(1), EMPTY_CALL, r"capture_mode='timestep'"),
    "mixed calls": (DYNAMIC, [[1], {"x": 1}], r"entries of one form"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_session_that_makes_no_sense_cannot_be_constructed(case):
    processors, calls, message = REFUSED[case]

    with pytest.raises((ConfigError, CalibrationError), match=message):
        SessionConfig(processor_cfg_map=processors, calib_data=calls, device="cpu")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: W8A8QuantConfig(act_method="entropy"),
            r"valid act_method, but got 'entropy': .*'histogram'",
        ),
        (lambda: W8A8TimeStepQuantConfig(rows="prefix"), r"valid rows, but got 'prefix'"),
        (lambda: W8A8TimeStepProcessorConfig(timestep_sep=-1), r"valid timestep_sep, but got -1"),
        (lambda: W8A8TimeStepProcessorConfig(), r"must be given timestep_sep"),
        (lambda: W8A8ProcessorConfig(disable_name=[]), r"got 'disable_name'; did you mean 'disable_names'"),
        (lambda: M6Config(alpha=0.8), r"given together, but got 0.8 and None"),
        (lambda: M6Config(alpha=1.5, beta=0.2), r"valid alpha, but got 1.5"),
        (lambda: SaveProcessorConfig(output_path="o", save_type=["numpy"]), r"must be \['safe_tensor'\], but got"),
        (lambda: SaveProcessorConfig(output_path="o", part_file_size=0), r"valid part_file_size, but got 0"),
        (lambda: SaveProcessorConfig(output_path="o", json_name="a/b.json"), r"a/b.json"),
        (lambda: SaveProcessorConfig(output_path="o", safetensors_name="w.bin"), r"w.bin"),
        (lambda: SessionConfig(processor_cfg_map=DYNAMIC, calibration="twice"), r"valid calibration, but got 'twice'"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_session_is_frozen_and_validates_itself_again():
    session_cfg = SessionConfig(processor_cfg_map=DYNAMIC, calib_data=[], device="cpu")

    assert session_cfg.model_validate(session_cfg) is session_cfg
    with pytest.raises(ValueError, match="frozen"):
        session_cfg.device = "npu"


def test_pydantic_is_left_as_it_is():
    class Own(BaseModel):
        x: int = 0

    assert Own(x=1, unknown=2).x == 1


def test_importing_touches_no_file(tmp_path):
    script = "import hyquant\nfor name in hyquant._HOMES: getattr(hyquant, name)"

    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["args", "kwargs", "timestep", "the peer's timestep"])
def test_every_form_of_calls_calibrates_any_module_alike(form):
    calls = {
        "args": [[x_of(0)], [x_of(1) * 2, 1.0]],
        "kwargs": [{"x": x_of(0)}, {"x": x_of(1) * 2, "scale": 1.0}],
        "timestep": steps(2),
        "the peer's timestep": [
            {**entry, "args": [*entry["args"], 1.0], "kwargs": {"x": entry["args"][0], "scale": 1.0}}
            for entry in steps(2)
        ],
    }
    model = Net()

    quantize(model, {"w8a8": W8A8ProcessorConfig()}, calls[form], deploy_dtype="float32")

    seen = torch.cat([x_of(0), x_of(1) * 2])
    expected = (seen.amax() - seen.amin()) / 255
    torch.testing.assert_close(quantized_tensors(model)["first"]["input_scale"], expected[None], rtol=1e-6, atol=0)


def test_dynamic_needs_no_calls_and_keeps_what_it_computes_near():
    model, x = Net(), x_of(3)
    before = model(x)

    report = quantize(model, DYNAMIC, [])

    assert [layer.name for layer in report.layers] == ["first", "last"]
    assert isinstance(model.first, QuantLinear)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0.02 * before.abs().max().item())


def test_autocast_for_cuda_changes_nothing_on_a_cpu():
    found = []
    for enabled in (False, True):
        model = Net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            context = torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=enabled)
        with context:
            quantize(model, {"w8a8": W8A8ProcessorConfig()}, [[x_of(0)]])
        found.append(quantized_tensors(model)["last"])

    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_second_session_begins_with_the_float_model():
    once, twice = Net(), Net()
    quantize(twice, timestep(0), steps(2))
    quantize(twice, DYNAMIC, [])
    quantize(once, DYNAMIC, [])
    TimestepManager.set_timestep_idx(40)

    assert torch.equal(once(x_of(1)), twice(x_of(1)))
    assert len(twice._forward_pre_hooks) == len(once._forward_pre_hooks) == 1
    restore_(twice)
    assert torch.equal(Net()(x_of(1)), twice(x_of(1)))


def test_the_steps_of_the_manager_choose_mode_and_row():
    """Before timestep_sep the layer is that of w8a8_dynamic; after it every step has the range of its own calls."""
    model, dynamic = Net(), Net()
    quantize(model, timestep(2), steps(4))
    quantize(dynamic, DYNAMIC, [])
    x, outputs = x_of(9), []
    for step_index in range(4):
        TimestepManager.set_timestep_idx(step_index)
        outputs.append(model(x))

    assert torch.equal(outputs[0], dynamic(x))
    assert torch.equal(outputs[1], outputs[0])
    assert model.first.fused.is_static_step
    assert not torch.equal(outputs[2], outputs[3])
    scales = quantized_tensors(model)["first"]["input_scale"][:, 0]
    expected = torch.stack([(entry["args"][0].amax() - entry["args"][0].amin()) / 255 for entry in steps(4)])
    torch.testing.assert_close(scales, expected, rtol=2**-8, atol=0)


def test_a_clock_of_ones_own_is_followed_instead():
    model, clock = Net(), StepClock()
    session_cfg = SessionConfig(processor_cfg_map=timestep(1), calib_data=steps(2))
    quant_model(model, session_cfg, clock=clock)
    TimestepManager.set_timestep_idx(0)

    clock.set(1)
    model(x_of(0))

    assert model.first.fused.is_static_step


def test_rows_of_suffixes_cover_later_steps():
    model = Net()
    quantize(model, timestep(0, rows="suffix"), list(reversed(steps(3))), deploy_dtype="float32")

    inputs = [entry["args"][0] for entry in steps(3)]
    spans = [torch.cat(inputs[index:]) for index in range(3)]
    expected = torch.stack([(span.amax() - span.amin()) / 255 for span in spans])
    torch.testing.assert_close(quantized_tensors(model)["first"]["input_scale"][:, 0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sep", [3, 25])
def test_a_separation_at_or_beyond_the_last_step_is_dynamic_with_one_warning(sep):
    model = Net()
    with pytest.warns(UserWarning, match=f"timestep_sep {sep} lies beyond the 3 recorded steps") as caught:
        quantize(model, timestep(sep), steps(3))
    TimestepManager.set_timestep_idx(2)
    model(x_of(0))

    assert len(caught) == 1
    assert not model.first.fused.is_static_step


def test_a_missing_step_is_named():
    with pytest.raises(CalibrationError, match=r"first: .*step 1"):
        quantize(Net(), timestep(0), [steps(3)[0], steps(3)[2]])


def test_a_session_without_save_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="hyquant"):
        quantize(Net(), DYNAMIC, [])

    assert sum("nothing is written" in record.message for record in caplog.records) == 1


def test_a_name_that_is_no_linear_is_refused_with_the_closest():
    processors = {"w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=["frist"])}
    with pytest.raises(LayerMatchError, match=r"'frist' \(1 in all\) is none; did you mean 'first'"):
        quantize(Net(), processors, [])


def test_names_are_names_and_no_patterns():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("a[0]", nn.Linear(8, 8))
            self.add_module("a0", nn.Linear(8, 8))

    model = Odd()
    quantize(model, {"w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=["a[0]"])}, [])

    assert list(quantized_tensors(model)) == ["a0"]
    with pytest.raises(LayerMatchError, match=r"'a\*'"):
        quantize(Odd(), {"w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=["a*"])}, [])


def test_the_last_linear_is_left_in_float_only_if_asked():
    kept, quantized = Net(), Net()
    quantize(kept, DYNAMIC, [], disable_last_linear=True)
    quantize(quantized, DYNAMIC, [])

    assert list(quantized_tensors(kept)) == ["first"]
    assert list(quantized_tensors(quantized)) == ["first", "last"]


def test_part_of_a_fused_layer_cannot_be_disabled_in_diffusers_layout():
    model = load_pipeline("diffusers").transformer
    parts = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]

    with pytest.raises(ConfigError, match=r"double_blocks.0.img_attn_qkv .*disabled together, but .*attn.to_q only"):
        quantize(model, {"w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=parts[:1])}, [])
    assert swapped(model) is None
    for names in (parts, ["double_blocks.0.img_attn_qkv"]):
        blocks = hyquant.get_disable_layer_names(model, "*_blocks.*")
        quantize(model, {"w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=blocks + names)}, [])
        assert not quantized_tensors(model).keys() & set(parts)
        assert "transformer_blocks.0.attn.add_q_proj" in quantized_tensors(model)


def outside(model):
    return hyquant.get_disable_layer_names(model, ["*double_blocks*", "*single_blocks*"])


@pytest.mark.parametrize("smoothing", ["m3", "m4", "m6", "m6 searched"])
@pytest.mark.parametrize("with_fa3", [False, True], ids=["", "fa3"])
@pytest.mark.parametrize("quantizer", ["w8a8", "w8a8_dynamic", "w8a8_timestep"])
def test_smoothing_composes_with_every_quantizer_and_attention(dumped, smoothing, with_fa3, quantizer):
    layout, calls, calls_with_steps = dumped
    model = load_pipeline(layout).transformer
    quantizers = {
        "w8a8": lambda names: W8A8ProcessorConfig(disable_names=names),
        "w8a8_dynamic": lambda names: W8A8DynamicProcessorConfig(disable_names=names),
        "w8a8_timestep": lambda names: W8A8TimeStepProcessorConfig(disable_names=names, timestep_sep=1),
    }
    smoothings = {
        "m3": M3ProcessorConfig(),
        "m4": M4ProcessorConfig(),
        "m6": M6ProcessorConfig(cfg=M6Config(alpha=0.8, beta=0.2)),
        "m6 searched": M6ProcessorConfig(),
    }
    processors = {
        **({"fa3": FA3ProcessorConfig()} if with_fa3 else {}),
        quantizer: quantizers[quantizer](outside(model)),
        smoothing.partition(" ")[0]: smoothings[smoothing],
    }
    args = calls_with_steps[2]["args"]
    TimestepManager.set_timestep_idx(2)
    before = first_tensor(model(*args))

    quantize(model, processors, calls_with_steps if quantizer == "w8a8_timestep" else calls)
    after = first_tensor(model(*args))

    smoothed = [path for path, tensors in quantized_tensors(model).items() if "mul_scale" in tensors]
    assert len(smoothed) == (4 if layout == "original" else 12)
    assert len(attention_tensors(model)) == (4 if with_fa3 else 0)
    cosine = torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0)
    assert 0.99 < cosine < 0.9999999


def test_the_order_of_keys_means_nothing(dumped):
    layout, calls, _ = dumped
    found = []
    for turn in (1, -1):
        model = load_pipeline(layout).transformer
        processors = {
            "fa3": FA3ProcessorConfig(),
            "m4": M4ProcessorConfig(),
            "w8a8": W8A8ProcessorConfig(disable_names=outside(model)),
        }
        quantize(model, dict(list(processors.items())[::turn]), calls)
        found.append({**quantized_tensors(model), **attention_tensors(model)})

    assert found[0].keys() == found[1].keys()
    for path, tensors in found[0].items():
        assert all(torch.equal(found[1][path][name], tensor) for name, tensor in tensors.items())


def test_attention_needs_a_model_that_has_some():
    with pytest.raises(ConfigError, match="needs blocks that own an attention"):
        quantize(Net(), DYNAMIC | {"fa3": FA3ProcessorConfig()}, [[x_of(0)]])


def test_the_model_must_be_on_the_device_of_the_session():
    with pytest.raises(ConfigError, match="on cpu and the session says 'npu:0'"):
        quant_model(Net(), SessionConfig(processor_cfg_map=DYNAMIC, device="npu:0"))


def save(folder, **fields):
    return DYNAMIC | {"save": SaveProcessorConfig(output_path=folder, save_type=["safe_tensor"], **fields)}


def test_names_of_ones_own_are_the_names_of_the_files(tmp_path):
    out = tmp_path / "out"
    quantize(Net(), save(str(out), safetensors_name="w.safetensors", json_name="d.json"), [])

    assert sorted(file.name for file in out.iterdir()) == ["d.json", "hyq_manifest.json", "w.safetensors"]
    assert read_manifest(out).names[0].weights == "w.safetensors"


def test_parts_are_counted_in_gib(tmp_path):
    """1 MiB is 2 ** -10 of them: 300 000 float32 values and their int8 halves are more than that."""
    model = nn.Sequential(nn.Linear(600, 900), nn.Linear(900, 900))
    quantize(model, save(tmp_path / "out", part_file_size=2**-10), [])

    index = json.loads((tmp_path / "out/quant_model_weight_w8a8_dynamic.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        f"quant_model_weight_w8a8_dynamic-0000{part}-of-00002.safetensors" for part in (1, 2)
    }
    x = torch.ones(1, 600)
    expected = model(x)
    restore_(model)
    hyquant.load_quantized(model, tmp_path / "out", StepClock())
    assert torch.equal(model(x), expected)


class NeverCalled(Net):
    def forward(self, x):
        raise AssertionError("calibrated")


def test_a_folder_that_cannot_be_written_is_refused_before_calibration(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    processors = save(tmp_path / "out") | {"m4": M4ProcessorConfig()}

    with pytest.raises(ExportError, match="holds other things"):
        quantize(NeverCalled(), processors, [[x_of(0)]])
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_an_export_is_replaced_only_if_said(tmp_path):
    quantize(Net(), save(tmp_path / "out"), [])

    with pytest.raises(ExportError, match="holds an export already"):
        quantize(Net(), save(tmp_path / "out"), [])
    quantize(Net(), save(tmp_path / "out", overwrite=True), [])


def test_what_a_target_would_ignore_is_refused(tmp_path):
    model = load_pipeline("original").transformer
    processors = {
        "fa3": FA3ProcessorConfig(),
        "w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=outside(model)),
        "save": SaveProcessorConfig(output_path=tmp_path / "out", target="mindie-sd-3.1/910b"),
    }

    with pytest.raises((ConfigError, ExportError), match="ignores int8 attention without a message"):
        quantize(model, processors, EMPTY_CALL)


def test_nothing_but_the_export_is_written(tmp_path, monkeypatch):
    """Not even features.npy."""
    monkeypatch.chdir(tmp_path)
    quantize(Net(), {"w8a8": W8A8ProcessorConfig(cfg=W8A8QuantConfig(act_method="histogram"))}, [[x_of(0)]])

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["minmax", "mean_minmax", "histogram", "mix"])
def test_every_act_method_is_accepted_by_every_quantizer(method):
    processors = [
        {"w8a8": W8A8ProcessorConfig(cfg=W8A8QuantConfig(act_method=method))},
        {"w8a8_dynamic": W8A8DynamicProcessorConfig(cfg=W8A8DynamicQuantConfig(act_method=method))},
        timestep(1, act_method=method),
    ]
    for each in processors:
        model = Net()
        quantize(model, each, steps(3), calibration="sequential")
        assert len(quantized_tensors(model)) == 2


def test_a_sequential_session_observes_later_blocks_behind_quantized_ones(dumped):
    layout, calls, _ = dumped
    found = {}
    for way in ("single_pass", "sequential"):
        model = load_pipeline(layout).transformer
        processors = {"w8a8": W8A8ProcessorConfig(disable_names=outside(model))}
        quantize(model, processors, calls, calibration=way, deploy_dtype="float32")
        found[way] = {path: tensors["input_scale"] for path, tensors in quantized_tensors(model).items()}

    same = {path for path, scale in found["single_pass"].items() if torch.equal(scale, found["sequential"][path])}
    first, last = {"original": ("double_blocks.0.", "single_blocks.1.linear2")}.get(
        layout, ("transformer_blocks.0.", "single_transformer_blocks.1.proj_out")
    )
    assert {path for path in found["single_pass"] if path.startswith(first)} <= same
    assert last not in same


def test_the_mean_of_extremes_is_what_the_peer_calls_minmax():
    calls = [[x_of(0)], [x_of(1) * 3]]
    model = Net()
    quantize(
        model,
        {"w8a8": W8A8ProcessorConfig(cfg=W8A8QuantConfig(act_method="mean_minmax"))},
        calls,
        deploy_dtype="float32",
    )

    lows, highs = zip(*((x.amin(), x.amax()) for (x,) in calls), strict=True)
    expected = (sum(highs) - sum(lows)) / 2 / 255
    found = quantized_tensors(model)["first"]["input_scale"]
    torch.testing.assert_close(found, expected[None], rtol=1e-6, atol=0)
