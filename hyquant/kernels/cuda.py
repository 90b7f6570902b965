"""int8 Linears on NVIDIA cards by `torch._int_mm`, which cuBLASLt runs on the integer tensor cores.

The operators around the product become one loop before it and one after it where a block is compiled, as latencies
measure it; in eager mode they run one by one.

cuBLASLt takes more than 16 rows, and input and output channels that are multiples of 8: what is missing is filled up
with zeros, which add nothing to any sum. Source: the checks of `_int_mm_cuda` in ATen/native/cuda/Blas.cpp.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hyquant.kernels.base import MatmulKernel

_LEAST_ROWS = 17
_MULTIPLE = 8
_TURING = (7, 5)


def padded_weight(weight: Tensor) -> Tensor:
    """Return an [N, K] int8 weight with both sizes filled up to multiples of 8."""
    return F.pad(weight, (0, -weight.shape[1] % _MULTIPLE, 0, -weight.shape[0] % _MULTIPLE))


def padded_int_mm(q: Tensor, weight: Tensor, num_outputs: int) -> Tensor:
    """Return q @ weight^T in int32.

    Args:
        q: [M, K] int8.
        weight: What `padded_weight` gave.
        num_outputs: N.
    """
    rows, inputs = q.shape
    missing = max(_LEAST_ROWS - rows, 0)
    padded = F.pad(q, (0, weight.shape[1] - inputs, 0, missing))
    return torch._int_mm(padded, weight.t())[:rows, :num_outputs]


def has_integer_cores(device: torch.device) -> bool:
    """Return whether this is an NVIDIA card of Turing (7.5) or later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= _TURING


CUDA_INT_MM = MatmulKernel(
    name="cuda_int_mm", kind="native", int_mm=padded_int_mm, runs_on=has_integer_cores, pack=padded_weight
)
