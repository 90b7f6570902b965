"""The export contract, typed in: names, keys, dtypes, shapes and modes of real exports, by no code of ours.

Layers are those of the toys (hidden 64 in the original layout, 32 in diffusers'), loops have 4 steps. The table is
that of MindIE-SD 3.1 per algorithm; `weight_offset` is what msModelSlim writes besides.
"""

import json
import stat

import pytest
from safetensors import safe_open

QKV, FC2, TO_Q = "double_blocks.1.img_attn_qkv", "double_blocks.1.txt_mlp.fc2", "transformer_blocks.1.attn.to_q"

STATIC_QKV = {
    f"{QKV}.weight": ("W8A8", "I8", [192, 64]),
    f"{QKV}.input_scale": ("W8A8", "F32", [1]),
    f"{QKV}.input_offset": ("W8A8", "F32", [1]),
    f"{QKV}.deq_scale": ("W8A8", "F32", [192]),
    f"{QKV}.quant_bias": ("W8A8", "I32", [192]),
    f"{QKV}.bias": ("FLOAT", "F32", [192]),
}
DYNAMIC_QKV = {
    f"{QKV}.weight": ("W8A8_DYNAMIC", "I8", [192, 64]),
    f"{QKV}.weight_scale": ("W8A8_DYNAMIC", "F32", [192, 1]),
    f"{QKV}.weight_offset": ("W8A8_DYNAMIC", "F32", [192, 1]),
    f"{QKV}.bias": ("FLOAT", "F32", [192]),
}
W8A16_QKV = {
    f"{QKV}.weight": ("W8A16", "I8", [192, 64]),
    f"{QKV}.weight_scale": ("W8A16", "F32", [192, 1]),
    f"{QKV}.bias": ("FLOAT", "F32", [192]),
}
W4A16_FC2 = {
    f"{FC2}.weight": ("W4A16", "I8", [64, 256]),
    f"{FC2}.weight_scale": ("W4A16", "F32", [64, 1]),
    f"{FC2}.bias": ("FLOAT", "F32", [64]),
}
TIMESTEP_FC2 = {
    f"{FC2}.weight": ("W8A8_TIMESTEP", "I8", [64, 256]),
    f"{FC2}.weight_scale": ("W8A8_TIMESTEP", "F32", [64, 1]),
    f"{FC2}.weight_offset": ("W8A8_TIMESTEP", "F32", [64, 1]),
    f"{FC2}.input_scale": ("W8A8_TIMESTEP", "F32", [4, 1]),
    f"{FC2}.input_offset": ("W8A8_TIMESTEP", "F32", [4, 1]),
    f"{FC2}.deq_scale": ("W8A8_TIMESTEP", "F32", [4, 64]),
    f"{FC2}.quant_bias": ("W8A8_TIMESTEP", "I32", [4, 64]),
    f"{FC2}.bias": ("FLOAT", "F32", [64]),
}
SMOOTHED_QKV = {
    f"{QKV}.div.mul_scale": ("FLOAT", "F32", [64]),
    f"{QKV}.linear.weight": ("W8A8_TIMESTEP", "I8", [192, 64]),
    f"{QKV}.linear.weight_scale": ("W8A8_TIMESTEP", "F32", [192, 1]),
    f"{QKV}.linear.weight_offset": ("W8A8_TIMESTEP", "F32", [192, 1]),
    f"{QKV}.linear.input_scale": ("W8A8_TIMESTEP", "F32", [4, 1]),
    f"{QKV}.linear.input_offset": ("W8A8_TIMESTEP", "F32", [4, 1]),
    f"{QKV}.linear.deq_scale": ("W8A8_TIMESTEP", "F32", [4, 192]),
    f"{QKV}.linear.quant_bias": ("W8A8_TIMESTEP", "I32", [4, 192]),
    f"{QKV}.linear.bias": ("FLOAT", "F32", [192]),
}
SMOOTHED_TO_Q = {
    f"{TO_Q}.div.mul_scale": ("FLOAT", "F32", [32]),
    f"{TO_Q}.linear.weight": ("W8A8_DYNAMIC", "I8", [32, 32]),
    f"{TO_Q}.linear.weight_scale": ("W8A8_DYNAMIC", "F32", [32, 1]),
    f"{TO_Q}.linear.weight_offset": ("W8A8_DYNAMIC", "F32", [32, 1]),
    f"{TO_Q}.linear.bias": ("FLOAT", "F32", [32]),
}
INT8_HEADS = {
    "single_blocks.0.fa_q.scale": ("FAQuant", "F32", [2, 1]),
    "single_blocks.0.fa_q.offset": ("FAQuant", "I8", [2, 1]),
    "single_blocks.0.fa_k.scale": ("FAQuant", "F32", [2, 1]),
    "single_blocks.0.fa_k.offset": ("FAQuant", "I8", [2, 1]),
    "single_blocks.0.fa_v.scale": ("FAQuant", "F32", [2, 1]),
    "single_blocks.0.fa_v.offset": ("FAQuant", "I8", [2, 1]),
}
ROTATIONS = {
    "double_blocks.0.q_rot": ("FLOAT", "BF16", [32, 32]),
    "double_blocks.0.k_rot": ("FLOAT", "BF16", [32, 32]),
}


def in_float16(table, *, deq_scale):
    """Return a table whose scales of products are int64; the contract's column for a float16 engine."""
    changed = {key: ("I64" if key.endswith("deq_scale") else dtype) for key, (_, dtype, _) in table.items()}
    assert ("I64" in changed.values()) == deq_scale
    return {key: (kind, changed[key], shape) for key, (kind, _, shape) in table.items()}


CASES = {
    # name of the export: route, type in the file names, prefix of the layer, its tensors
    "static": ("original", "W8A8", QKV, STATIC_QKV),
    "dynamic": ("original", "W8A8_DYNAMIC", QKV, DYNAMIC_QKV),
    "timestep": ("original", "W8A8_TIMESTEP", FC2, TIMESTEP_FC2),
    "w8a16": ("original", "W8A16", QKV, W8A16_QKV),
    "w4a16": ("original", "W4A16", FC2, W4A16_FC2),
    "m4 timestep": ("original", "W8A8_TIMESTEP", QKV, SMOOTHED_QKV),
    "m4 dynamic": ("diffusers", "W8A8_DYNAMIC", TO_Q, SMOOTHED_TO_Q),
    "int8 attention, dynamic": ("original", "W8A8_DYNAMIC", "single_blocks.0.fa_", INT8_HEADS),
    "fp8 attention, dynamic": (
        "original",
        "W8A8_DYNAMIC",
        ("double_blocks.0.q_rot", "double_blocks.0.k_rot"),
        ROTATIONS,
    ),
    "unrotated fp8 attention, dynamic": (
        "original",
        "W8A8_DYNAMIC",
        ("double_blocks.0.q_rot", "double_blocks.0.k_rot"),
        ROTATIONS,
    ),
    "fp8 attention alone": ("original", "FP8_DYNAMIC", ("double_blocks.0.q_rot", "double_blocks.0.k_rot"), ROTATIONS),
    "float16 static": ("original", "W8A8", QKV, in_float16(STATIC_QKV, deq_scale=True)),
    "float16 dynamic": ("original", "W8A8_DYNAMIC", QKV, in_float16(DYNAMIC_QKV, deq_scale=False)),
    "float16 timestep": ("original", "W8A8_TIMESTEP", FC2, in_float16(TIMESTEP_FC2, deq_scale=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_an_export_has_the_names_keys_dtypes_shapes_and_modes_of_the_contract(export_of, name):
    route, kind, prefix, table = CASES[name]
    folder = export_of(route, name)
    weights = folder / f"quant_model_weight_{kind.lower()}.safetensors"
    description = json.loads((folder / f"quant_model_description_{kind.lower()}.json").read_text())

    with safe_open(weights, "numpy") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        found = {
            key: (description[key], part.get_dtype(), part.get_shape())
            for key, part in slices.items()
            if key.startswith(prefix if isinstance(prefix, tuple) else (prefix,))
        }

    assert found == table
    assert description["model_quant_type"] == kind
    described = {key for key in description if not key.endswith("quant_type")}
    assert described == slices.keys()
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()} == {
        weights.name: "0o640",
        f"quant_model_description_{kind.lower()}.json": "0o640",
        "hyq_manifest.json": "0o640",
    }
    assert oct(stat.S_IMODE(folder.stat().st_mode)) == "0o750"


def test_attention_is_announced_as_each_engine_line_reads_it(export_of):
    int8, fp8 = (
        json.loads((export_of("original", name) / "quant_model_description_w8a8_dynamic.json").read_text())
        for name in ("int8 attention, dynamic", "fp8 attention, dynamic")
    )

    assert int8["fa_quant_type"] == "FAQuant"
    assert {key: value for key, value in fp8.items() if key.endswith(".quant_type")} == {
        "double_blocks.0.quant_type": "FP8_DYNAMIC",
        "double_blocks.1.quant_type": "FP8_DYNAMIC",
        "single_blocks.0.quant_type": "FP8_DYNAMIC",
        "single_blocks.1.quant_type": "FP8_DYNAMIC",
    }
    assert "fa_quant_type" not in fp8


def test_every_row_of_a_float_layer_is_described_as_float(export_of):
    path = export_of("original", "static of the seed's layers") / "quant_model_description_w8a8.json"
    description = json.loads(path.read_text())

    assert description["double_blocks.0.img_mod.linear.weight"] == "FLOAT"
    assert description["double_blocks.0.img_mod.linear.bias"] == "FLOAT"
    assert description["double_blocks.0.txt_mlp.fc2.weight"] == "FLOAT"
    assert description["double_blocks.0.txt_mod.linear.weight"] == "W8A8"
    assert description["final_layer.linear.weight"] == "FLOAT"
    assert description["img_in.proj.weight"] == "FLOAT"
