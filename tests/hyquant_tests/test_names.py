"""HunyuanVideo's names on the published configuration, built without weights on the meta device."""

from fnmatch import fnmatchcase

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn
from torch.nn import functional as F

from hyquant.config import LayerSelection
from hyquant.errors import LayerMatchError
from hyquant.layers import select_layers
from hyquant.models.names import layer_groups, to_diffusers, to_original
from hyquant.models.tiny import random_denoiser

SEED_INCLUDE = ("*double_blocks*", "*single_blocks*")


@pytest.fixture(scope="module")
def published() -> nn.Module:
    """The 13B configuration: 20 double and 40 single blocks, 2 refiner blocks; the class's defaults."""
    with torch.device("meta"):
        return HunyuanVideoTransformer3DModel()


@pytest.fixture(scope="module")
def groups(published):
    return layer_groups(published)


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return random_denoiser(0, torch.float32)


def test_the_published_model_has_343_original_and_547_diffusers_linears(groups, published):
    modules = [path for group in groups for path in group.modules]

    assert len(groups) == 343
    assert len(modules) == len(set(modules)) == 547
    assert set(modules) == {name for name, module in published.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(
    ("exclude", "num_groups", "num_modules"),
    [(("*img_mod*", "*modulation*", "*fc2*"), 220, 420), (("*img_mod*", "*modulation*"), 260, 460)],
    ids=["timestep and dynamic", "fa3"],
)
def test_the_seeds_selections_have_their_original_sizes(groups, exclude, num_groups, num_modules):
    selection = LayerSelection(include=SEED_INCLUDE, exclude=exclude)

    chosen = set(select_layers([group.name for group in groups], selection, model="hunyuan_video"))

    assert len(chosen) == num_groups
    assert sum(len(group.modules) for group in groups if group.name in chosen) == num_modules


@pytest.mark.parametrize(
    ("original_glob", "diffusers_globs", "num_groups"),
    [
        ("*double_blocks*", ("transformer_blocks.*",), 200),
        ("*single_blocks*", ("single_transformer_blocks.*",), 120),
        ("*img_mod*", ("transformer_blocks.*.norm1.linear",), 20),
        (
            "*modulation*",
            (
                "single_transformer_blocks.*.norm.linear",
                "norm_out.linear",
                "context_embedder.*.norm_out.linear",
            ),
            43,
        ),
        ("*fc2*", ("*.net.2",), 42),
    ],
)
def test_each_original_glob_hits_the_equivalent_diffusers_modules(groups, original_glob, diffusers_globs, num_groups):
    """The diffusers side is matched by hand-written globs, independent of the tables."""
    hit = [group for group in groups if fnmatchcase(group.name, original_glob)]
    by_canonical_name = {path for group in hit for path in group.modules}
    by_diffusers_name = {
        path for group in groups for path in group.modules if any(fnmatchcase(path, glob) for glob in diffusers_globs)
    }

    assert len(hit) == num_groups
    assert by_canonical_name == by_diffusers_name


def test_groups_come_blocks_first_with_the_shapes_of_the_paper_model(groups):
    by_name = {group.name: group for group in groups}

    assert [group.name for group in groups[:2]] == ["double_blocks.0.img_mod.linear", "double_blocks.0.img_attn_qkv"]
    assert by_name["single_blocks.39.linear1"].out_features == (3072, 3072, 3072, 12288)
    assert by_name["single_blocks.39.linear2"].in_features == 15360
    assert by_name["double_blocks.19.txt_mlp.fc2"].modules == ("transformer_blocks.19.ff_context.net.2",)


def test_a_state_dict_survives_the_trip_to_original_names_and_back(tiny):
    state = tiny.state_dict()

    back = to_diffusers(to_original(state))

    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_a_fused_original_linear_computes_what_its_parts_compute(tiny):
    original = to_original(tiny.state_dict())
    block = tiny.single_transformer_blocks[1]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    fused = F.linear(x, original["single_blocks.1.linear1.weight"], original["single_blocks.1.linear1.bias"])
    parts = [block.attn.to_q(x), block.attn.to_k(x), block.attn.to_v(x), block.proj_mlp(x)]

    torch.testing.assert_close(fused, torch.cat(parts, dim=-1), rtol=1e-5, atol=1e-6)  # float32 sums of 32 products


def test_the_final_modulation_has_shift_before_scale_in_the_original(tiny):
    """In diffusers, AdaLayerNormContinuous chunks (scale, shift), the original's FinalLayer (shift, scale)."""
    original = to_original(tiny.state_dict())
    c = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))

    prefix = "final_layer.adaLN_modulation.1"
    shift, scale = F.linear(c, original[f"{prefix}.weight"], original[f"{prefix}.bias"]).chunk(2, dim=-1)
    expected_scale, expected_shift = tiny.norm_out.linear(c).chunk(2, dim=-1)

    torch.testing.assert_close(shift, expected_shift, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=1e-6)


def test_quantized_tensors_convert_like_weights():
    shared = torch.tensor([[0.5], [0.25]])
    state = {}
    for index, name in enumerate(("to_q", "to_k", "to_v")):
        prefix = f"transformer_blocks.0.attn.{name}"
        state[f"{prefix}.weight"] = torch.full((4, 4), index, dtype=torch.int8)
        state[f"{prefix}.deq_scale"] = torch.full((2, 4), float(index))
        state[f"{prefix}.input_scale"] = shared

    original = to_original(state)
    back = to_diffusers(original)

    assert original["double_blocks.0.img_attn_qkv.deq_scale"].shape == (2, 12)
    assert torch.equal(original["double_blocks.0.img_attn_qkv.input_scale"], shared)
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_members_with_different_input_scales_cannot_be_fused():
    state = {
        f"transformer_blocks.0.attn.{name}.input_scale": torch.tensor([float(index)])
        for index, name in enumerate(("to_q", "to_k", "to_v"))
    }

    with pytest.raises(ValueError, match="img_attn_qkv must share one 'input_scale'"):
        to_original(state)


@pytest.mark.parametrize("convert", [to_original, to_diffusers])
def test_a_key_without_a_counterpart_is_an_error(convert):
    with pytest.raises(LayerMatchError, match=r"text_model\.layer"):
        convert({"text_model.layer.weight": torch.zeros(1)})


def test_half_a_fused_group_is_an_error():
    with pytest.raises(LayerMatchError, match=r"attn\.to_v"):
        to_original({f"transformer_blocks.0.attn.{name}.weight": torch.zeros(2, 2) for name in ("to_q", "to_k")})
