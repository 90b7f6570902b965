"""The CUDA kernel hands to cuBLASLt what obeys its rules, and on a card gives the reference kernel's results."""

import pytest
import torch

from hyquant.kernels import KERNELS
from hyquant.kernels.cuda import padded_int_mm, padded_weight
from hyquant.kernels.selection import LinearShape, candidates, kernel_for, kernel_times
from tests.reference.cublas import by_cublas_rules

SIZES = [(1, 8, 8), (16, 40, 24), (17, 64, 8), (5, 1, 1), (33, 19, 7), (0, 16, 16), (1025, 129, 63)]


def codes(*shape, seed=0, lowest=-128):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lowest, 128, shape, generator=generator, dtype=torch.int16).to(torch.int8)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_cublas_gets_obeys_its_rules_and_the_product_is_exact(size, monkeypatch):
    rows, inputs, outputs = size
    q, weight = codes(rows, inputs), codes(outputs, inputs, seed=1, lowest=-127)
    monkeypatch.setattr(torch, "_int_mm", by_cublas_rules)

    product = padded_int_mm(q, padded_weight(weight), outputs)

    assert product.dtype == torch.int32
    assert torch.equal(product.long(), q.long() @ weight.long().t())


def test_a_weight_that_needs_no_filling_is_not_copied():
    weight = codes(16, 24)

    assert padded_weight(weight) is weight


def test_it_is_no_candidate_on_a_cpu():
    assert not KERNELS["cuda_int_mm"].is_available(torch.device("cpu"))


@pytest.fixture
def card():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device("cuda", 0)


@pytest.mark.cuda
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_card_gives_what_the_reference_kernel_gives(size, dtype, is_compiled, card):
    rows, inputs, outputs = size
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(2)).to(dtype).to(card)
    weight = codes(outputs, inputs, seed=1, lowest=-127).to(card)
    scale, bias = torch.linspace(0.001, 0.01, outputs, device=card)[:, None], torch.ones(outputs, device=card)

    def run(name, compiled):
        kernel = KERNELS[name]
        call = torch.compile(kernel.dynamic) if compiled else kernel.dynamic
        return call(x, kernel.prepare(weight), weight_scale=scale, bias=bias, mul_scale=None)

    found, expected = run("cuda_int_mm", is_compiled), run("reference", False)

    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=127 * 0.01 * 0.05)


@pytest.mark.cuda
def test_a_card_chooses_the_native_kernel(card, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = LinearShape(256, 256)

    assert [kernel.name for kernel in candidates(card)] == ["cuda_int_mm"]
    assert kernel_for(card, shape).kind == "native"
    assert set(kernel_times(card, shape)) == {"cuda_int_mm"}
