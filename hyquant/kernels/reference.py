"""The reference kernel: the integer product computed exactly in float32, on any device.

A float32 sum of int8 products is exact while it stays below 2^24, so K is cut into blocks of 1024: 1024 * 128 * 127 is
16 646 144 < 2^24. int8 values also survive TF32 and bf16 operands, so reduced matmul precision does no harm.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hyquant.kernels.base import MatmulKernel

_EXACT_BLOCK = 1024


def float_int_mm(q: Tensor, weight: Tensor, num_outputs: int) -> Tensor:
    """Return q @ weight^T in int32 by exact float32 products.

    Args:
        q: [M, K] int8.
        weight: [N, K] int8, values in [-127, 127].
        num_outputs: N.
    """
    blocks = zip(torch.split(q, _EXACT_BLOCK, dim=1), torch.split(weight, _EXACT_BLOCK, dim=1), strict=True)
    products = [F.linear(q_block.float(), w_block.float()).to(torch.int32) for q_block, w_block in blocks]
    total = products[0]
    for product in products[1:]:
        total = total + product
    return total


def runs_everywhere(device: torch.device) -> bool:
    """Return True: float32 products exist on every device."""
    return True


REFERENCE = MatmulKernel(name="reference", kind="simulated", int_mm=float_int_mm, runs_on=runs_everywhere)
