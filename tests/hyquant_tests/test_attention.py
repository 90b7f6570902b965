"""Statistics, integers, float8 blocks and rotations of quantized attention, each against a few lines of their own."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hyquant.attention.fp8 import Fp8Attention, fp8_tensors, kept_in_blocks
from hyquant.attention.int8 import Int8Attention, int8_tensors
from hyquant.attention.rotation import rotation
from hyquant.attention.stats import (
    HeadStats,
    Ratios,
    head_stats,
    merge,
    merge_head_stats,
    pack_head_stats,
    ratios_of,
    unpack_head_stats,
)
from hyquant.attention.window import narrowest_window
from hyquant.config import FA3Int8
from hyquant.distributed import Group
from hyquant.errors import CalibrationError, ConfigError

ALL = Ratios(1.0, 1.0, 1.0)


def random_qkv(seed, *, tokens=9, heads=3, head_dim=8, batch=1):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1.0, 4.0, 0.1])[:heads, None]
    return [torch.randn(batch, tokens, heads, head_dim, generator=generator) * spread for _ in range(3)]


def brute_force_window(values, ratio):
    ordered = np.sort(values.numpy())
    kept = max(1, math.floor(len(ordered) * ratio))
    starts = range(len(ordered) - kept + 1)
    start = min(starts, key=lambda i: (ordered[i + kept - 1] - ordered[i], i))
    return ordered[start], ordered[start + kept - 1]


@pytest.mark.parametrize("size", [1, 2, 7, 100, 3001])
@pytest.mark.parametrize("ratio", [0.501, 0.8, 0.99, 0.9999, 1.0])
def test_the_window_is_the_narrowest_of_all(size, ratio):
    skewed = torch.randn(size, generator=torch.Generator().manual_seed(size)).exp()

    lo, hi = narrowest_window(skewed, ratio)

    assert (lo.item(), hi.item()) == brute_force_window(skewed, ratio)


def test_of_equally_narrow_windows_the_lowest_is_taken():
    lo, hi = narrowest_window(torch.tensor([3.0, 1.0, 0.0, 2.0]), 0.75)

    assert (lo.item(), hi.item()) == (0.0, 2.0)


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_is_seen_even_where_it_is_dropped(broken):
    lo, hi = narrowest_window(torch.cat((torch.linspace(-1, 1, 99), torch.tensor([broken]))), 0.9)

    assert not (torch.isfinite(lo) and torch.isfinite(hi))


def test_absmax_scales_are_numpys_maximum_per_head():
    q, k, v = random_qkv(0)

    stored = int8_tensors(head_stats(q, k, v, None, ALL), "float32")

    for part, x in (("fa_q", q), ("fa_k", k), ("fa_v", v)):
        expected = np.abs(x.numpy()).max(axis=(0, 1, 3))[:, None] / np.float32(127)
        np.testing.assert_array_equal(stored[f"{part}.scale"].numpy(), expected)
        assert stored[f"{part}.offset"].dtype == torch.int8
        assert not stored[f"{part}.offset"].any()


def test_a_window_scale_covers_the_window_of_each_head_alone():
    q, k, v = random_qkv(1, tokens=50)

    stats = head_stats(q, k, v, None, Ratios(0.9, 0.99, 1.0))

    for row, (x, ratio) in enumerate(((q, 0.9), (k, 0.99), (v, 1.0))):
        for head in range(3):
            expected = brute_force_window(x[:, :, head].flatten(), ratio)
            assert (stats.lo[row, head].item(), stats.hi[row, head].item()) == expected


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_scales_have_one_row_per_head_whatever_the_number_of_tokens(tokens):
    stats = head_stats(*random_qkv(2, tokens=tokens), None, ratios_of(FA3Int8()))

    assert int8_tensors(stats, "bfloat16")["fa_q.scale"].shape == (3, 1)


def test_statistics_of_calls_of_different_lengths_merge_to_those_of_all_tokens():
    parts = [random_qkv(seed, tokens=tokens) for seed, tokens in ((0, 3), (1, 17), (2, 1))]
    joint = [torch.cat(xs, dim=1) for xs in zip(*parts, strict=True)]

    first, second, third = (head_stats(*part, None, ALL) for part in parts)
    merged = merge(merge(third, first), second)
    other = merge(first, merge(second, third))

    expected = head_stats(*joint, None, ALL)
    assert torch.equal(merged.lo, expected.lo)
    assert torch.equal(merged.hi, expected.hi)
    assert torch.equal(merged.lo, other.lo)
    assert torch.equal(merged.hi, other.hi)
    assert merged.calls.tolist() == other.calls.tolist() == [3]


def test_windows_of_calls_merge_to_the_widest_bounds():
    a, b = (head_stats(*random_qkv(seed, tokens=60), None, Ratios(0.9, 0.9, 0.9)) for seed in (3, 4))

    merged = merge(a, b)

    assert torch.equal(merged.lo, torch.minimum(a.lo, b.lo))
    assert torch.equal(merged.hi, torch.maximum(a.hi, b.hi))


def test_statistics_of_other_heads_do_not_merge():
    one, other = (head_stats(*random_qkv(0, heads=heads), None, ALL) for heads in (2, 3))

    with pytest.raises(ValueError, match="equal heads, but got 2 and 3"):
        merge(one, other)


def test_padded_tokens_are_left_out():
    q, k, v = random_qkv(5, tokens=6, batch=2)
    valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    for x in (q, k, v):
        x[0, 4:] = 1000.0

    stats = head_stats(q, k, v, valid, ALL)

    expected = np.stack([np.concatenate((x[0, :4].numpy(), x[1].numpy())).max(axis=(0, 2)) for x in (q, k, v)])
    np.testing.assert_array_equal(stats.hi.numpy(), expected)


def test_statistics_survive_packing_and_one_rank_merges_to_itself():
    stats = {f"double_blocks.{i}": head_stats(*random_qkv(i), None, ALL) for i in range(2)}

    for again in (unpack_head_stats(pack_head_stats(stats)), merge_head_stats(stats, Group())):
        assert list(again) == list(stats)
        assert all(torch.equal(again[name].lo, stats[name].lo) for name in stats)


def test_absmax_keeps_everything_and_window_what_it_is_told():
    assert ratios_of(FA3Int8(statistic="absmax", ratio_qk=0.9)) == ALL
    assert ratios_of(FA3Int8(ratio_qk=0.9, ratio_v=0.99)) == Ratios(0.9, 0.9, 0.99)


def codes_of(hook, q, k, v):
    scales = [scale.numpy() for scale in (hook.q_scale, hook.k_scale, hook.v_scale)]
    codes = [np.clip(np.rint(x.float().numpy() / s), -128, 127) for x, s in zip((q, k, v), scales, strict=True)]
    return codes, scales


def test_simulated_int8_attention_equals_integers_times_scales():
    q, k, v = random_qkv(6, tokens=20)
    hook = Int8Attention(int8_tensors(head_stats(q, k, v, None, ALL), "bfloat16"))

    out = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in hook(q, k, v, None)))

    codes, scales = codes_of(hook, q, k, v)
    q_codes, k_codes, v_codes = (x.transpose(0, 2, 1, 3).astype(float) for x in codes)
    q_scale, k_scale, v_scale = (s[None, :, :, None].astype(float).reshape(1, 3, 1, 1) for s in scales)
    logits = (q_codes @ k_codes.transpose(0, 1, 3, 2)) * q_scale * k_scale / math.sqrt(8)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v_codes * v_scale
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-9)


def test_in_bfloat16_what_int8_keeps_is_rounded_once():
    q, k, v = (x.bfloat16() for x in random_qkv(6))
    hook = Int8Attention(int8_tensors(head_stats(q, k, v, None, ALL), "bfloat16"))

    kept = hook(q, k, v, None)

    for x, codes, scale in zip(kept, *codes_of(hook, q, k, v), strict=True):
        assert torch.equal(x, torch.from_numpy(codes * scale).bfloat16())


def test_int8_is_within_half_a_scale_where_nothing_is_clamped():
    q, k, v = random_qkv(7)
    hook = Int8Attention(int8_tensors(head_stats(q, k, v, None, ALL), "float32"))

    for x, kept, scale in zip((q, k, v), hook(q, k, v, None), (hook.q_scale, hook.k_scale, hook.v_scale), strict=True):
        assert ((x - kept).abs() <= 0.5001 * scale).all()
        assert ((x - kept).abs() > 0.1 * scale).any()


def test_int8_attention_is_rebuilt_from_its_tensors():
    stored = int8_tensors(head_stats(*random_qkv(8), None, ALL), "bfloat16")

    again = Int8Attention(stored).tensors()

    assert sorted(again) == sorted(stored)
    assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_intervals_that_are_not_finite_make_no_scales():
    stats = HeadStats(torch.full((3, 1), -1.0), torch.full((3, 1), math.inf), torch.ones(1, dtype=torch.int64))

    with pytest.raises(CalibrationError, match="must be finite"):
        int8_tensors(stats, "bfloat16")


def e4m3_values():
    """Every finite magnitude of float8 e4m3, by its definition."""
    normal = [2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return np.array([m / 8 * 2.0**-6 for m in range(8)] + normal)


@pytest.mark.parametrize("tokens", [1, 127, 128, 130, 300])
def test_float8_blocks_hold_the_nearest_representable_values(tokens):
    x = random_qkv(9, tokens=tokens, heads=2, head_dim=4)[0]
    x[:, :2] *= 50.0

    kept = kept_in_blocks(x, 128)

    grid = e4m3_values()
    for start in range(0, tokens, 128):
        for head in range(2):
            block = x[0, start : start + 128, head].numpy()
            scale = np.abs(block).max() / np.float32(448)
            distance = np.abs(np.abs(block / scale)[..., None] - grid).min(-1)
            error = np.abs(kept[0, start : start + 128, head].numpy() - block) / scale
            np.testing.assert_allclose(error, distance, atol=1e-4)


def test_float8_loses_at_most_a_sixteenth_of_a_value_or_of_the_smallest_step():
    x = random_qkv(10, tokens=500, heads=1, head_dim=128)[0]

    kept = kept_in_blocks(x, 256)

    for start in range(0, 500, 256):
        block, held = x[:, start : start + 256], kept[:, start : start + 256]
        scale = block.abs().max() / 448
        assert ((block - held).abs() <= torch.maximum(block.abs() * 2**-4, scale * 2**-10) * 1.001).all()
    assert ((x - kept).abs() > x.abs() * 2**-6).any()


def test_float8_blocks_have_at_most_128_channels_and_zeros_stay_zeros():
    x = torch.ones(1, 4, 1, 256)
    x[..., 128:] = 1000.0
    zeros = torch.zeros(1, 3, 2, 8)

    assert torch.equal(kept_in_blocks(x, 128), x)
    assert torch.equal(kept_in_blocks(zeros, 128), zeros)


@pytest.mark.parametrize("head_dim", [1, 4, 8, 16, 32, 64, 128, 256])
def test_a_rotation_is_orthogonal_to_the_last_bit_in_bfloat16(head_dim):
    matrix = rotation(head_dim)

    assert torch.equal(matrix.bfloat16().float(), matrix)
    assert torch.equal(matrix @ matrix.T, torch.eye(head_dim))
    assert torch.equal(matrix, rotation(head_dim))


def test_a_rotation_spreads_an_outlier_nearly_as_far_as_can_be():
    largest = rotation(128).abs().max().item()

    assert largest == 3 / 32
    assert largest < 1.07 / math.sqrt(128)


def test_another_seed_gives_another_rotation():
    assert not torch.equal(rotation(64), rotation(64, seed=1))


@pytest.mark.parametrize("head_dim", [2, 10, 80])
def test_heads_that_cannot_be_rotated_are_refused(head_dim):
    with pytest.raises(ConfigError, match=f"power of two.*{head_dim}.*rotate=False"):
        rotation(head_dim)


def test_rotating_leaves_products_as_they_are_and_float8_near_them():
    q, k, v = random_qkv(11, tokens=40, heads=2, head_dim=128)
    for x in (q, k):
        x[..., 5] *= 200.0
    rotated, plain = (Fp8Attention(fp8_tensors(128, "bfloat16", rotate=rotate)) for rotate in (True, False))
    product = torch.einsum("bsad,btad->bast", q.double(), k.double())

    def loss(hook):
        kept_q, kept_k, _ = hook(q, k, v, None)
        return (torch.einsum("bsad,btad->bast", kept_q.double(), kept_k.double()) - product).norm() / product.norm()

    assert rotated.q_rot.dtype == torch.bfloat16
    spun = torch.einsum("bsad,btad->bast", q @ rotated.q_rot.float(), k @ rotated.k_rot.float())
    torch.testing.assert_close(spun.double(), product, rtol=1e-4, atol=product.abs().max().item() * 1e-6)
    assert loss(rotated) < 0.06
    assert loss(plain) < 0.06
    assert rotated.tensors().keys() == {"q_rot", "k_rot"}
    assert all(torch.equal(matrix, torch.eye(128).bfloat16()) for matrix in plain.tensors().values())
    assert plain.tensors().keys() == {"q_rot", "k_rot"}
