"""Sequence parallelism and shared decoding: real ranks over gloo, each compared with itself alone."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from hyquant.distributed import Group
from hyquant.errors import ConfigError
from hyquant.models.tiny import TinyVideoModel
from hyquant.parallel import parallelize_, parallelize_vae_, unparallelize_, unparallelize_vae_
from hyquant.parallel.decode import deal
from hyquant.parallel.mesh import Mesh
from hyquant.parallel.sequence import require_ring_on
from hyquant.parallel.softmax import merged, partial_attention
from hyquant.parallel.strips import Strips
from tests.toys.original_dit import random_toy

PROGRAM = Path(__file__).with_name("parallel_ranks.py")
FLOAT32 = 1e-6
"""Relative error of float32 sums in another order; the mini model shows 3e-7, and 4e-2 if a mask is out of order."""
FLOAT64 = 1e-12
QUANTIZED = ["static", "dynamic", "timestep", "fa3_int8", "dynamic and fa3_int8"]
CASES = ["full", "padded", "padded, odd number of tokens", "fewer tokens than ranks"]
NUM_TOKENS = [48, 48, 45, 1]


@pytest.fixture(scope="module")
def found():
    """What two and four ranks found out: a list by rank."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[2])},
        cwd=PROGRAM.parents[2],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_two_ranks_give_what_one_gives(found, way):
    for rank in found["two"]:
        assert [rank[way]["calls"][case]["error"] for case in CASES] == pytest.approx([0] * 4, abs=FLOAT32)
        assert rank[way]["rendered"] < FLOAT32


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("ways", ["2x2", "4x1", "1x4"])
def test_four_ranks_give_what_one_gives(found, ways):
    for rank in found["four"]:
        assert [rank[ways][case]["error"] for case in CASES] == pytest.approx([0] * 4, abs=FLOAT32)


@pytest.mark.multiproc
@pytest.mark.slow
def test_each_rank_has_its_strip_only(found):
    for rank in found["two"]:
        assert [rank["ulysses"]["calls"][case]["num_tokens"] for case in CASES] == [-(-num // 2) for num in NUM_TOKENS]
    for rank in found["four"]:
        assert [rank["2x2"][case]["num_tokens"] for case in CASES] == [-(-num // 4) for num in NUM_TOKENS]


@pytest.mark.multiproc
@pytest.mark.slow
def test_text_and_output_are_equal_on_all_ranks_bit_by_bit(found):
    for case in CASES:
        for thing in ("text", "output"):
            assert len({rank["2x2"][case][thing] for rank in found["four"]}) == 1
            assert len({rank["1x4"][case][thing] for rank in found["four"]}) == 1


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("way", ["ulysses", "ring"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_denoisers_are_shared_in_either_order(found, way, name):
    """In double precision: in float32 a last bit may decide which integer a value is rounded to."""
    for rank in found["two"]:
        errors = rank[f"quantized {way}"]

        assert errors[name] < FLOAT64
        assert errors[f"{name}, after"] < FLOAT64
        assert errors[f"{name}, restored"] < FLOAT64
        assert errors[f"{name}, undone"] == 0
        assert errors[f"{name} differs from float"] > 1e-4


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_undoing_leaves_nothing_behind(found, way):
    assert [rank[way]["undone"] for rank in found["two"]] == [True, True]


@pytest.mark.multiproc
@pytest.mark.slow
def test_what_cannot_be_shared_is_refused_with_the_reason(found):
    for rank in found["two"]:
        assert "already; call unparallelize_ first" in rank["ring"]["again"]
        assert "cannot be copied" in rank["ring"]["twin"]
        assert "Fp8Attention of transformer_blocks.0 shares scales among tokens" in rank["ring"]["fp8 before"]
        assert "Fp8Attention of transformer_blocks.0 shares scales among tokens" in rank["ring"]["fp8 after"]
        assert "(ulysses, ring) are [[1, 2], [2, 1]] by rank" in rank["disagreeing"]
        assert rank["ring"]["still exact"] < FLOAT32


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("tiles", ["frames", "frames and space", "slices too", "space alone", "one piece"])
def test_a_shared_decode_is_the_serial_one_bit_by_bit(found, tiles):
    for rank in found["two"]:
        assert rank["decoders"][tiles] is True
        assert rank["decoders"]["as a tuple"] is True


@pytest.mark.multiproc
@pytest.mark.slow
def test_the_patch_codec_is_shared_and_given_back(found):
    for rank in found["two"]:
        assert rank["decoders"]["codec"] is True
        assert rank["decoders"]["undone"] is True
        assert "already; call unparallelize_vae_ first" in rank["decoders"]["again"]


@pytest.mark.parametrize("cuts", [[7, 30], [0, 0, 50], [1, 2, 3, 49], [50]], ids=str)
def test_attention_over_parts_merges_to_attention_over_all_keys(cuts):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, generator=generator, dtype=torch.float64) for n in (9, 50, 50))
    valid = torch.rand(2, 50, generator=generator) < 0.4
    weights = (torch.einsum("bqad,bsad->baqs", 3 * q, k) / 8**0.5).masked_fill(~valid[:, None, None], -torch.inf)
    expected = torch.einsum("baqs,bsad->bqad", weights.softmax(dim=-1), v)

    bounds = [0, *cuts, 50]
    parts = [
        partial_attention(3 * q, k[:, start:end], v[:, start:end], valid[:, start:end])
        for start, end in itertools.pairwise(bounds)
    ]

    torch.testing.assert_close(merged(parts).out, expected, rtol=0, atol=1e-14)


def test_attention_in_pieces_of_queries_is_attention(monkeypatch):
    q, k, v = torch.randn(3, 2, 20, 3, 8, generator=torch.Generator().manual_seed(0)).unbind()
    whole = partial_attention(q, k, v)
    monkeypatch.setattr("hyquant.parallel.softmax._SCORES_AT_ONCE", 2 * 3 * 20 * 7)

    pieces = partial_attention(q, k, v)

    torch.testing.assert_close(pieces.out, whole.out, rtol=0, atol=1e-6)
    torch.testing.assert_close(pieces.lse, whole.lse, rtol=0, atol=1e-6)


def test_half_precision_is_attended_and_merged_in_float32():
    q, k, v = torch.randn(3, 2, 20, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()

    assert partial_attention(q, k, v).out.dtype == torch.float32


def test_no_keys_at_all_give_zeros_of_no_weight():
    q = torch.ones(1, 2, 1, 4)
    part = partial_attention(q, q, q, torch.zeros(1, 2, dtype=torch.bool))

    assert torch.equal(part.out, torch.zeros(1, 2, 1, 4))
    assert torch.equal(merged([part, part]).lse, torch.full((1, 2, 1, 1), -torch.inf))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_cuda_is_that_of_the_cpu(dtype):
    """bfloat16 keeps 8 bits: the kernel rounds probabilities and its result, 2^-8 of values below 1 each."""
    q, k, v = torch.randn(3, 2, 200, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    expected, found = partial_attention(q, k, v), partial_attention(q.cuda(), k.cuda(), v.cuda())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2

    torch.testing.assert_close(found.out.cpu(), expected.out, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.lse.cpu(), expected.lse, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("num_tokens", [1, 5, 8, 11])
def test_strips_are_the_tokens_in_order_and_copies_of_the_last(num_tokens, ulysses, ring):
    tokens = torch.arange(num_tokens)
    strips = [Strips(Mesh(rank, ulysses, ring)) for rank in range(4)]
    row = torch.cat([strip.cut(tokens, 0) for strip in strips])

    assert torch.equal(row[:num_tokens], tokens)
    assert torch.equal(row[num_tokens:], torch.full((len(row) - num_tokens,), num_tokens - 1))
    assert len(row) < num_tokens + 4
    assert sum(strips[0].num_keys(place) for place in range(ring)) == num_tokens


def test_ranks_of_an_ulysses_group_are_neighbours_and_rings_lead_across():
    places = [Mesh(rank, ulysses=3, ring=2) for rank in range(6)]

    assert [(mesh.ring_rank, mesh.ulysses_rank) for mesh in places] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [mesh.ring_neighbour(1) for mesh in places] == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "loads"),
    [([4, 4, 4, 4], 2, [8, 8]), ([7, 1, 1, 1, 1, 3], 2, [7, 7]), ([5], 3, [5, 0, 0]), ([], 2, [0, 0])],
)
def test_pieces_are_dealt_out_evenly(sizes, num_ranks, loads):
    owners = deal(sizes, num_ranks)

    assert [
        sum(s for s, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(num_ranks)
    ] == loads


def test_one_rank_changes_nothing():
    denoiser = TinyVideoModel(0).denoiser
    before = dict(vars(denoiser)), [module.attn.processor for module in denoiser.transformer_blocks]
    parallelize_(denoiser, ulysses=1, ring=1, group=Group())

    assert (dict(vars(denoiser)), [module.attn.processor for module in denoiser.transformer_blocks]) == before
    unparallelize_(denoiser)
    unparallelize_vae_(nn.Identity())


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (4, 2), (0, 4), (-2, -2)])
def test_degrees_that_do_not_make_up_the_ranks_are_refused(ulysses, ring):
    with pytest.raises(ConfigError, match=rf"{ulysses} x {ring} is not 4"):
        parallelize_(TinyVideoModel(0).denoiser, ulysses=ulysses, ring=ring, group=Group(world_size=4))


def test_heads_that_do_not_divide_are_refused_with_degrees_that_do():
    with pytest.raises(ConfigError, match=r"must divide the 2 heads, but is 4; choose one of \[1, 2\]"):
        parallelize_(TinyVideoModel(0).denoiser, ulysses=4, ring=1, group=Group(world_size=4))


def test_the_original_layout_is_refused():
    with pytest.raises(ConfigError, match="needs diffusers' HunyuanVideoTransformer3DModel"):
        parallelize_(random_toy(0), ulysses=2, ring=1, group=Group(world_size=2))


def test_blocks_that_treat_the_first_frame_differently_are_refused():
    denoiser = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        image_condition_type="token_replace",
    )
    with pytest.raises(ConfigError, match="treats the first frame's differently"):
        parallelize_(denoiser, ulysses=2, ring=1, group=Group(world_size=2))


def test_a_denoiser_that_diffusers_distributed_is_refused():
    denoiser = TinyVideoModel(0).denoiser
    denoiser._parallel_config = object()
    with pytest.raises(ConfigError, match="diffusers' enable_parallelism was called on it"):
        parallelize_(denoiser, ulysses=2, ring=1, group=Group(world_size=2))


def test_a_ring_refuses_back_ends_that_it_would_not_use():
    denoiser = TinyVideoModel(0).denoiser
    active = _AttentionBackendRegistry.get_active_backend()[0]
    denoiser.set_attention_backend("_native_math")
    _AttentionBackendRegistry.set_active_backend(active)  # diffusers sets it for every other model of the process too
    with pytest.raises(ConfigError, match="has the attention back end"):
        parallelize_(denoiser, ulysses=1, ring=2, group=Group(world_size=2))


def test_a_ring_is_refused_on_npus_with_the_reason():
    with pytest.raises(ConfigError, match="log-sum-exp, but that of an NPU does not; use ring 1"):
        require_ring_on("npu")
    require_ring_on("cpu")
    require_ring_on("cuda")


def test_a_decoder_of_another_class_is_refused():
    with pytest.raises(ConfigError, match=r"AutoencoderKLHunyuanVideo or a PatchPCACodec.*but got Identity"):
        parallelize_vae_(nn.Identity(), Group(world_size=2))
