"""Rows of weights in C against the operators of torch, bit by bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyquant.kernels import x86_rows
from hyquant.kernels.x86_build import AVX2_BUILD, VNNI_BUILD
from hyquant.kernels.x86_rows import has_rows_kernel, quantize_rows, row_absmax, row_sums, signal_and_noise, sums_rows
from hyquant.numerics.error import decibels, sqnr_db
from hyquant.numerics.qparams import QParams, choose_qparams
from hyquant.schemes.weights import dequantize_weight, quantize_weight, static_constants

CPU = torch.device("cpu")
BUILDS = [build for build in (AVX2_BUILD, VNNI_BUILD) if build.is_available(CPU)]
pytestmark = pytest.mark.skipif(not BUILDS, reason="needs x86-64 and a C compiler")


@pytest.fixture(params=BUILDS, ids=lambda build: build.name, autouse=True)
def build(request, monkeypatch):
    monkeypatch.setattr(x86_rows, "_build", lambda: request.param)


def random_weight(rows, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.randint(-6, 4, (rows, 1), generator=generator)
    return (torch.randn(rows, columns, generator=generator) * spread).to(dtype)


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 2600))


@settings(max_examples=40, deadline=None)
@given(
    shape=SHAPES, seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16]), mul=st.booleans()
)
def test_absmax_and_codes_are_those_of_torch(shape, seed, dtype, mul):
    weight = random_weight(*shape, seed, dtype)
    factors = torch.rand(shape[1], generator=torch.Generator().manual_seed(seed)) * 3 if mul else None
    product = weight.float() if factors is None else weight.float() * factors

    absmax = row_absmax(weight, factors)
    assert torch.equal(absmax, product.abs().amax(dim=1, keepdim=True))

    for scale, qmin, qmax in ((absmax / 127 + 1e-30, -127, 127), (absmax / 11 + 1e-30, -8, 7)):
        expected = (product / scale).round().clamp(qmin, qmax).to(torch.int8)
        assert torch.equal(quantize_rows(weight, scale, factors, qmin=qmin, qmax=qmax), expected)
        assert torch.equal(row_sums(expected), expected.sum(dim=1, dtype=torch.int32))


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_signal_and_noise_are_those_of_float64(shape, seed, dtype):
    weight = random_weight(*shape, seed, dtype)
    scale = row_absmax(weight) / 127 + 1e-30
    codes = quantize_rows(weight, scale, qmin=-127, qmax=127)

    signal, noise = signal_and_noise(weight, codes, scale)

    kept = (codes.float() * scale).double()
    assert signal == pytest.approx(weight.double().square().sum().item(), rel=1e-4)
    assert noise == pytest.approx((weight.double() - kept).square().sum().item(), rel=1e-3, abs=1e-12 * signal)
    assert decibels(signal, noise) == pytest.approx(sqnr_db(weight.double(), kept), abs=0.01)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, 1023, 1500, 1506])
def test_a_row_with_a_value_that_is_not_finite_has_no_finite_absmax(broken, place):
    weight = random_weight(3, 1507)
    weight[1, place] = broken

    assert torch.isfinite(row_absmax(weight)).flatten().tolist() == [True, False, True]


def test_strided_rows_are_read_right():
    weight = random_weight(20, 66)[:, ::2]

    assert torch.equal(row_absmax(weight), weight.abs().amax(dim=1, keepdim=True))
    assert torch.equal(row_absmax(weight.t()), weight.t().abs().amax(dim=1, keepdim=True))


@pytest.mark.parametrize("deploy_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_weights_are_quantized_as_without_the_c_code(monkeypatch, deploy_dtype, with_bias):
    weight, factors = random_weight(30, 700), torch.rand(700) + 0.1
    bias = torch.linspace(-1e6, 1e6, 30) if with_bias else None
    inputs = choose_qparams(torch.tensor([-1.0]), torch.tensor([3.0]), symmetric=False)
    scale = inputs.scale if with_bias else None

    def quantized():
        codes, scales = quantize_weight(weight, deploy_dtype, bias=bias, input_scale=scale, mul=factors)
        return codes, scales, *static_constants(codes, scales, bias, QParams(*inputs))

    found = quantized()
    monkeypatch.setattr("hyquant.schemes.weights.has_rows_kernel", lambda _: False)
    expected = quantized()

    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (dequantize_weight(*found[:2]) - weight * factors).abs().max() <= found[1].max()


def test_only_matrices_on_the_cpu_in_known_dtypes_have_it(monkeypatch):
    assert has_rows_kernel(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert not has_rows_kernel(torch.zeros(2, 3, dtype=torch.int8))
    assert sums_rows(torch.zeros(2, 3, dtype=torch.int8))
    assert not has_rows_kernel(torch.zeros(2, 3, dtype=torch.float16))
    assert not has_rows_kernel(torch.zeros(2, 3, 4))
    assert not has_rows_kernel(torch.zeros(2, 3, device="meta"))
    monkeypatch.setattr(x86_rows, "_build", lambda: None)
    assert not has_rows_kernel(torch.zeros(2, 3))
