"""Laws that every entry of KERNELS obeys; kernels this machine cannot run are skipped by name."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyquant.kernels import KERNELS
from hyquant.kernels.base import Int8Linear

CPU = torch.device("cpu")

pytestmark = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(kernel, id=name, marks=pytest.mark.skipif(not kernel.is_available(CPU), reason=f"no {name} here"))
        for name, kernel in KERNELS.items()
    ],
)

ROWS, COLUMNS = 7, 19
SHAPES = {"one token": (1,), "rows": (5,), "tokens": (2, 9), "4-D": (2, 1, 3), "no rows": (2, 0)}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int16).to(torch.int8)


def run_static(kernel: Int8Linear, x: torch.Tensor, *, mul_scale: torch.Tensor | None = None) -> torch.Tensor:
    weight = int8(ROWS, COLUMNS)
    return kernel.static(
        x,
        kernel.prepare(weight),
        input_scale=torch.tensor([0.03125]),
        input_offset=torch.tensor([-7.0]),
        deq_scale=normal(ROWS).abs() * 1e-3,
        quant_bias=torch.arange(ROWS, dtype=torch.int32) * 1000,
        mul_scale=mul_scale,
    )


def run_dynamic(kernel: Int8Linear, x: torch.Tensor, *, mul_scale: torch.Tensor | None = None) -> torch.Tensor:
    weight = int8(ROWS, COLUMNS)
    return kernel.dynamic(
        x,
        kernel.prepare(weight),
        weight_scale=normal(ROWS, 1).abs() * 1e-2,
        bias=normal(ROWS, seed=1),
        mul_scale=mul_scale,
    )


def test_the_table_key_is_the_name(kernel):
    assert KERNELS[kernel.name] is kernel


def test_static_agrees_with_numpy(kernel):
    x, mul = normal(5, COLUMNS, seed=2) * 3, torch.linspace(0.5, 2, COLUMNS)

    actual = run_static(kernel, x, mul_scale=mul)

    q = np.clip(np.rint(x.numpy() * mul.numpy() / np.float32(0.03125) + np.float32(-7)), -128, 127).astype(np.int64)
    product = q @ int8(ROWS, COLUMNS).numpy().astype(np.int64).T + np.arange(ROWS) * 1000
    expected = product.astype(np.float32) * (normal(ROWS).abs() * 1e-3).numpy()
    np.testing.assert_array_equal(actual.numpy(), expected)


def test_dynamic_agrees_with_numpy(kernel):
    x, mul = normal(5, COLUMNS, seed=2) * 3, torch.linspace(0.5, 2, COLUMNS)

    actual = run_dynamic(kernel, x, mul_scale=mul)

    rows = x.numpy() * mul.numpy()
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    product = np.rint(rows / scale).astype(np.int64) @ int8(ROWS, COLUMNS).numpy().astype(np.int64).T
    expected = product.astype(np.float32) * scale * (normal(ROWS, 1).abs() * 1e-2).numpy()[:, 0]
    expected = expected + normal(ROWS, seed=1).numpy()
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6, atol=1e-6)  # float32 epilogue of three operations


@pytest.mark.parametrize("run", [run_static, run_dynamic], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", SHAPES.values(), ids=SHAPES)
def test_every_shape_and_dtype_gives_the_reference_kernels_bits(kernel, run, dtype, leading):
    x = normal(*leading, COLUMNS).to(dtype)

    actual = run(kernel, x)

    assert actual.shape == (*leading, ROWS)
    assert actual.dtype == dtype
    assert torch.equal(actual, run(KERNELS["reference"], x))


@pytest.mark.parametrize("num_inputs", [1, 33, 2051])
def test_extreme_codes_do_not_saturate(kernel, num_inputs):
    """Byte products summed in 16 bits overflow at once here; CPUs without VNNI are prone to it."""
    weight = torch.full((3, num_inputs), -127, dtype=torch.int8)

    actual = kernel.static(
        torch.full((2, num_inputs), -1e9),
        kernel.prepare(weight),
        input_scale=torch.ones(1),
        input_offset=torch.zeros(1),
        deq_scale=torch.ones(3),
        quant_bias=torch.zeros(3, dtype=torch.int32),
        mul_scale=None,
    )

    assert actual.unique().tolist() == [float(np.float32(num_inputs * 127 * 128))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_4_bits_agree_with_numpy(kernel, dtype):
    """Codes lie in [-7, 7]; the zero token shows that nothing is divided by 0."""
    x, weight = (normal(6, COLUMNS, seed=2) * 3).to(dtype), int8(ROWS, COLUMNS).clamp(-8, 7)
    x[3] = 0

    actual = kernel.dynamic(
        x,
        kernel.prepare(weight),
        weight_scale=torch.full((ROWS, 1), 0.5),
        bias=None,
        mul_scale=None,
        largest_code=7,
    )

    rows = x.float().numpy()
    scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / np.float32(7), np.finfo(np.float32).tiny)
    codes = np.rint(rows / scale).astype(np.int64)
    expected = (codes @ weight.numpy().astype(np.int64).T).astype(np.float32) * scale * np.float32(0.5)
    assert np.abs(codes).max() == 7
    assert torch.equal(actual, torch.from_numpy(expected).to(dtype))


def test_an_all_zero_token_gives_exactly_the_bias(kernel):
    assert torch.equal(run_dynamic(kernel, torch.zeros(2, COLUMNS)), normal(ROWS, seed=1).expand(2, ROWS))


def test_a_strided_input_is_the_same_as_its_copy(kernel):
    x = normal(4, 6, 2 * COLUMNS)[:, ::2, :COLUMNS]

    assert torch.equal(run_static(kernel, x), run_static(kernel, x.contiguous()))


@st.composite
def products(draw):
    """A Linear and an input of any size, dtype and layout, with zero tokens and huge outliers among normal values."""
    num_rows = draw(st.one_of(st.integers(1, 13), st.integers(90, 200), st.sampled_from([1023, 2049, 5000])))
    num_inputs = draw(st.one_of(st.integers(1, 70), st.integers(71, 600), st.sampled_from([2047, 2050, 4100])))
    num_outputs = draw(st.one_of(st.integers(1, 70), st.sampled_from([255, 577])))
    seed = draw(st.integers(0, 2**31))
    x = normal(num_rows, 2 * num_inputs, seed=seed)
    outlier = draw(st.sampled_from([1.0, 1e4, 1e30]))
    x[:: draw(st.integers(1, 5)), num_inputs // 2] *= outlier
    x[:: draw(st.integers(2, 7))] = 0
    x = x[:, ::2] if draw(st.booleans()) else x[:, :num_inputs].contiguous()
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    mul = normal(num_inputs, seed=seed + 1).abs() + 0.1 if draw(st.booleans()) else None
    return x.to(dtype), int8(num_outputs, num_inputs, seed=seed), mul, draw(st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(product=products())
def test_any_linear_gives_the_reference_kernels_bits(kernel, product):
    x, weight, mul, is_static = product
    num_outputs = weight.shape[0]
    scales = normal(num_outputs, 1).abs() + 1e-3
    reference = KERNELS["reference"]

    def run(one: Int8Linear) -> torch.Tensor:
        if not is_static:
            return one.dynamic(x, one.prepare(weight), weight_scale=scales, bias=scales[:, 0], mul_scale=mul)
        return one.static(
            x,
            one.prepare(weight),
            input_scale=torch.tensor([0.021]),
            input_offset=torch.tensor([-3.0]),
            deq_scale=scales[:, 0],
            quant_bias=torch.arange(num_outputs, dtype=torch.int32) - 5,
            mul_scale=mul,
        )

    assert torch.equal(run(kernel), run(reference))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("width", [19, 64])
def test_a_token_that_is_not_finite_does_not_become_finite(kernel, broken, width):
    x = normal(3, width)
    x[1, width // 2] = broken
    weight = int8(ROWS, width)
    given = {"weight_scale": torch.full((ROWS, 1), 0.01), "bias": None, "mul_scale": None}

    y = kernel.dynamic(x, kernel.prepare(weight), **given)

    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_a_strided_weight_is_prepared_as_its_copy(kernel):
    """The copy must outlive the call that reads it; a freed one is overwritten sooner or later."""
    weight = int8(64, 40).t()

    assert all(torch.equal(kernel.prepare(weight), kernel.prepare(weight.contiguous())) for _ in range(8))
