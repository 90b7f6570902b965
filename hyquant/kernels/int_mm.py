"""int8 Linears by `torch._int_mm`, which oneDNN runs on the int8 dot-product instructions of AVX512-VNNI and AMX.

Without those instructions PyTorch falls back to scalar loops that are tens of times slower than float32, so it is a
candidate only where they exist. Inside `torch.compile` the operators around the product become one loop before it and
one after it.
"""

import torch
from torch import Tensor

from hyquant.kernels.base import MatmulKernel


def cpu_int_mm(q: Tensor, weight: Tensor, num_outputs: int) -> Tensor:
    """Return q @ weight^T in int32; the weight stays [N, K] and is passed as a transposed view.

    With one input channel the view's strides are (1, 1), which torch 2.14.1's VNNI path reads wrongly (results are
    memory contents); that product needs no matrix multiplication.
    """
    if q.shape[1] == 1:
        return q.to(torch.int32) * weight.t().to(torch.int32)
    return torch._int_mm(q, weight.t())


def has_int8_instructions(device: torch.device) -> bool:
    """Return whether this is a CPU that multiplies int8 in hardware the way PyTorch's kernels use it."""
    return device.type == "cpu" and bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())


INT_MM = MatmulKernel(name="int_mm", kind="native", int_mm=cpu_int_mm, runs_on=has_int8_instructions)
