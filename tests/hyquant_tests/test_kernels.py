import pytest
import torch

from hyquant.kernels.reference import REFERENCE


def codes(*shape: int, seed: int, lowest: int = -128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lowest, 128, shape, generator=generator, dtype=torch.int16).to(torch.int8)


@pytest.mark.parametrize("num_inputs", [1, 7, 1024, 1025, 3000])
def test_the_reference_product_equals_int64_arithmetic(num_inputs):
    q, weight = codes(3, num_inputs, seed=0), codes(5, num_inputs, seed=1, lowest=-127)

    product = REFERENCE.int_mm(q, REFERENCE.prepare(weight), 5)

    assert torch.equal(product.long(), q.long() @ weight.long().t())


def test_the_reference_product_is_exact_at_its_extreme_under_reduced_matmul_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        product = REFERENCE.int_mm(
            torch.full((2, 4096), -128, dtype=torch.int8), torch.full((3, 4096), -127, dtype=torch.int8), 3
        )
    finally:
        torch.set_float32_matmul_precision(before)

    assert product.unique().tolist() == [4096 * 128 * 127]
