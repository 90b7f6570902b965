"""int8 attention as it really runs, against integers in plain torch and against float attention."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hyquant.attention.int8 import PARTS, Int8Attention
from hyquant.compiling import can_compile
from hyquant.kernels.selection import FORCED
from hyquant.kernels.x86_attention import LARGEST_HEAD_DIM, attends_natively, int8_attention
from tests.reference.int8_attention import attention_on_codes

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not attends_natively(CPU, 64), reason="needs AVX512-VNNI and a C compiler")


def random_operands(seed, queries, keys, heads, head_dim, batch=1, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, keys, keys)
    operands = [torch.randn(batch, size, heads, head_dim, generator=generator) * spread for size in sizes]
    scales = [x.abs().amax(dim=(0, 1, 3)).clamp(min=1e-6) / 127 for x in operands]
    return operands, scales


def run(operands, scales, valid=None):
    named = dict(zip(("q_scale", "k_scale", "v_scale"), (scale[:, None] for scale in scales), strict=True))
    return int8_attention(*operands, valid, **named)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def near(found, operands, scales, seen):
    """A numerator on the border between two codes may fall on either side: a 255th of a block's largest weight.

    What that moves is small beside the mean of |v|; the mean of v itself may be near zero.
    """

    def expected(q, k, v):
        samples = range(len(q))
        return torch.stack([attention_on_codes(q[i], k[i], v[i], scales, seen[i]) for i in samples])

    q, k, v = operands
    error = (found.double() - expected(q, k, v)).norm()
    return bool(error < 1e-3 * expected(q, k, v.abs()).norm())


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "head_dim"),
    [
        (1, 1, 1, 64),
        (48, 256, 2, 64),
        (49, 257, 2, 64),
        (7, 63, 3, 16),
        (100, 600, 1, 128),
        (5, 900, 2, 24),
        (9, 70, 1, 256),
    ],
)
def test_attention_is_that_of_integers(queries, keys, heads, head_dim):
    operands, scales = random_operands(0, queries, keys, heads, head_dim)

    found = run(operands, scales)

    assert found.shape == operands[0].shape
    assert near(found, operands, scales, torch.ones(1, keys, dtype=torch.bool))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    queries=st.integers(1, 120),
    keys=st.integers(1, 700),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 4, 17, 64, 100, 128]),
    batch=st.integers(1, 2),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
    share=st.sampled_from([0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_any_padding(queries, keys, heads, head_dim, batch, spread, share, seed):
    operands, scales = random_operands(seed, queries, keys, heads, head_dim, batch, spread)
    valid = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < share
    valid[:, 0] = True

    assert near(run(operands, scales, valid), operands, scales, valid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    operands, scales = random_operands(1, 50, 300, 2, 64)
    halves = [x.to(dtype) for x in operands]

    found = run(halves, scales)

    assert found.dtype == dtype
    assert torch.equal(found, run([x.float() for x in halves], scales).to(dtype))


def test_strided_operands_are_read_right():
    operands, scales = random_operands(2, 40, 40, 2, 32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands]

    assert torch.equal(run(strided, scales), run(operands, scales))


def test_results_do_not_depend_on_the_number_of_threads():
    operands, scales = random_operands(3, 130, 400, 2, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(operands, scales)
        torch.set_num_threads(4)
        assert torch.equal(run(operands, scales), alone)
    finally:
        torch.set_num_threads(threads)


def test_many_small_weights_are_kept_beside_a_large_one_far_off():
    """One key takes half of the softmax; each of the others would round to nothing beside it."""
    q = torch.full((1, 1, 1, 64), 1.0)
    k = torch.zeros(1, 2049, 1, 64)
    k[0, 0] = torch.log(torch.tensor(2048.0)) / 8
    v = torch.zeros(1, 2049, 1, 64)
    v[0, 1:] = 1.0
    scales = [torch.tensor([1 / 127]), torch.tensor([k.abs().max() / 127]), torch.tensor([1 / 127])]

    found = run((q, k, v), scales)

    # 255 keys share the first block with the large one and are lost; 1793 of 2048 remain.
    assert found.mean().item() == pytest.approx(1793 / (2048 + 1793), rel=0.02)


def test_what_no_row_may_see_is_not_read():
    operands, scales = random_operands(4, 20, 90, 2, 64)
    valid = torch.arange(90)[None] < 50
    expected = run(operands, scales, valid)
    for x in operands[1:]:
        x[:, 50:] = torch.nan

    assert torch.equal(run(operands, scales, valid), expected)
    assert not run(operands, scales, torch.zeros(1, 90, dtype=torch.bool)).any()


def test_int8_attention_is_as_near_to_float_as_its_codes_allow():
    operands, scales = random_operands(5, 300, 300, 2, 64)
    heads_first = [x.transpose(1, 2) for x in operands]
    kept = [((x / s[:, None, None]).round() * s[:, None, None]) for x, s in zip(heads_first, scales, strict=True)]
    plain, simulated = (F.scaled_dot_product_attention(*x).transpose(1, 2) for x in (heads_first, kept))

    found = run(operands, scales)

    assert relative_error(found, simulated) < 0.6 * relative_error(simulated, plain)
    assert relative_error(found, plain) < 1.3 * relative_error(simulated, plain)


@pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler")
def test_the_compiler_knows_the_operator():
    operands, scales = random_operands(6, 40, 40, 2, 64)
    hook = Int8Attention({f"{part}.scale": scale[:, None] for part, scale in zip(PARTS, scales, strict=True)})
    valid = torch.arange(40)[None] < 30

    found = torch.compile(hook.attend, fullgraph=True)(*operands, valid)

    torch.testing.assert_close(found, hook.attend(*operands, valid))


def test_other_kernels_by_force_wide_heads_and_other_devices_have_none(monkeypatch):
    assert not attends_natively(CPU, LARGEST_HEAD_DIM + 1)
    assert not attends_natively(torch.device("meta"), 64)
    monkeypatch.setenv(FORCED, "vnni")
    assert attends_natively(CPU, 64)
    monkeypatch.setenv(FORCED, "reference")
    assert not attends_natively(CPU, 64)


def test_operands_of_different_dtypes_are_read_as_what_they_are():
    """Autocast leaves q and k in float32 behind a norm and makes v bfloat16."""
    (q, k, v), scales = random_operands(1, 9, 70, 2, 32)
    expected = run([q, k, v.bfloat16().float()], scales)

    assert torch.equal(run([q, k, v.bfloat16()], scales), expected)


def test_scales_are_read_as_float32_whatever_their_dtype_and_strides():
    (q, k, v), scales = random_operands(1, 9, 70, 2, 32)
    rounded = [scale.bfloat16() for scale in scales]
    one = scales[0][:1]

    assert torch.equal(run([q, k, v], rounded), run([q, k, v], [scale.float() for scale in rounded]))
    assert torch.equal(run([q, k, v], [one.expand(2)] * 3), run([q, k, v], [one.repeat(2)] * 3))


@pytest.mark.parametrize(
    ("q", "k", "v", "valid", "sentence"),
    [
        ((1, 4, 2, 8), (1, 6, 2, 8), (1, 5, 2, 8), None, "must fit together"),
        ((1, 4, 2, 8), (1, 6, 3, 8), (1, 6, 3, 8), None, "must fit together"),
        ((1, 4, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8), (1, 7), "must fit together"),
        ((1, 4, 2, 300), (1, 6, 2, 300), (1, 6, 2, 300), None, "at most 256 channels"),
    ],
)
def test_what_does_not_fit_is_refused_before_c_reads_it(q, k, v, valid, sentence):
    mask = None if valid is None else torch.ones(valid, dtype=torch.bool)
    scales = {name: torch.ones(q[2], 1) for name in ("q_scale", "k_scale", "v_scale")}

    with pytest.raises(ValueError, match=sentence):
        int8_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), mask, **scales)


def test_an_empty_force_is_none(monkeypatch):
    monkeypatch.setenv(FORCED, "")

    assert attends_natively(CPU, 64)
