"""Quantized attention on more tokens than one block of scales holds, by the first attention that a model computes.

Both sides get the same float q, k and v there, so they differ by the engine's rounding to float16 alone: by far less
than other blocks or scales would make them, whose rounding errors are independent (1.4 times the distance to float).
"""

import copy

import pytest
import torch

from hyquant.config import FA3Fp8, FA3Int8, LayerSelection, QuantConfig, W8A8Dynamic
from tests.reference.attentions import Float8Attention
from tests.reference.loader import load
from tests.reference_tests.judging import relative_l2
from tests.reference_tests.routes import build_route, description_of, loaded_by_hyquant, velocity, write_export

LATE = LayerSelection(include=("single_blocks.1.linear2",))
ATTENTIONS = {
    "fp8": (None, FA3Fp8()),
    "fp8 unrotated": (None, FA3Fp8(rotate=False)),
    "int8 of windows": (W8A8Dynamic(), FA3Int8()),  # not without a Linear, which is a late one here
    "int8 of extremes": (W8A8Dynamic(), FA3Int8(statistic="absmax")),
}
READERS = {"original": "double_blocks.0.img_attn_proj", "diffusers": "transformer_blocks.0.attn.to_out.0"}


@pytest.fixture(scope="module", params=READERS)
def large(request):
    """Return a route of 288 video tokens and 5 of text: 3 blocks of q and 2 of k and v; and who reads its attention."""
    return build_route(request.param, "float16", grid=(2, 12, 12)), READERS[request.param]


def first_attention(model, name, inputs):
    """Return what the named Linear reads in one call."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    with torch.no_grad():
        velocity(model, inputs)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_hyquant_computes_attention_as_the_engine_does(large, tmp_path, name):
    route, reader = large
    linear, attention = ATTENTIONS[name]
    config = QuantConfig(linear=linear, attention=attention, layers=LATE, deploy_dtype="float16")
    folder = write_export(route, config, tmp_path / "export")
    loaded = load(copy.deepcopy(route.deployed), description_of(folder), dtype="float16", line="2.3")
    route.clock.set(0)

    expected = first_attention(route.deployed, reader, route.inputs)
    with loaded.running():
        engine = first_attention(loaded.model, reader, route.inputs)
    with loaded_by_hyquant(route, folder) as ours:
        simulated = first_attention(ours, reader, route.inputs)

    assert len(loaded.attentions) == 4
    assert relative_l2(engine, expected) < 0.05
    assert relative_l2(simulated, engine) < 0.5 * relative_l2(engine, expected)


def test_blocks_of_another_size_are_told_apart(large, tmp_path, monkeypatch):
    """The bar above can fail: half the tokens per scale, and the two sides are as far apart as from float."""
    route, reader = large
    config = QuantConfig(linear=None, attention=FA3Fp8(), deploy_dtype="float16")
    folder = write_export(route, config, tmp_path / "export")
    loaded = load(copy.deepcopy(route.deployed), description_of(folder), dtype="float16")
    right = Float8Attention.through_float8
    monkeypatch.setattr(Float8Attention, "through_float8", lambda self, x, rows: right(self, x, rows // 2))
    route.clock.set(0)

    expected = first_attention(route.deployed, reader, route.inputs)
    with loaded.running():
        engine = first_attention(loaded.model, reader, route.inputs)
    with loaded_by_hyquant(route, folder) as ours:
        simulated = first_attention(ours, reader, route.inputs)

    assert relative_l2(simulated, engine) > 0.5 * relative_l2(engine, expected)
