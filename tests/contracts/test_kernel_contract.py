"""Laws that every entry of KERNELS obeys; kernels this machine cannot run are skipped by name."""

import numpy as np
import pytest
import torch

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


def test_an_all_zero_token_gives_exactly_the_bias(kernel):
    assert torch.equal(run_dynamic(kernel, torch.zeros(2, COLUMNS)), normal(ROWS, seed=1).expand(2, ROWS))


def test_a_strided_input_is_the_same_as_its_copy(kernel):
    x = normal(4, 6, 2 * COLUMNS)[:, ::2, :COLUMNS]

    assert torch.equal(run_static(kernel, x), run_static(kernel, x.contiguous()))
