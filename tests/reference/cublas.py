"""What cuBLASLt takes for a product of int8 matrices, as hard conditions around an exact product.

Source: the checks of `_int_mm_cuda` in ATen/native/cuda/Blas.cpp of PyTorch.
"""

import torch


def by_cublas_rules(q, weight):
    """Return q [M, K] @ weight [K, N], a transposed view, in int32; refuse what `torch._int_mm` refuses on a card."""
    (rows, inputs), (inputs_too, outputs) = q.shape, weight.shape
    assert q.dtype == weight.dtype == torch.int8
    assert rows > 16
    assert inputs == inputs_too
    assert inputs % 8 == outputs % 8 == 0
    assert q.stride(1) == 1
    assert weight.stride(0) == 1
    return (q.long() @ weight.long()).to(torch.int32)
