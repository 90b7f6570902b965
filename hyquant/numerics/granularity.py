"""Which elements of a tensor share one scale, as frozen values, and the extremes per share.

tensor [2, 5, 8]   PerTensor   -> one scale            [1, 1, 1]
weight [N, C]      PerChannel  -> one per output row   [N, 1]
tokens [2, 5, 8]   PerToken    -> one per last-dim row [2, 5, 1]
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class PerTensor:
    """All elements share one scale."""


@dataclass(frozen=True)
class PerChannel:
    """Elements with the same index in dim 0 share a scale: the output channels of a weight [N, C]."""


@dataclass(frozen=True)
class PerToken:
    """Elements of one row along the last dim share a scale: the tokens of an activation [..., C]."""


Granularity: TypeAlias = PerTensor | PerChannel | PerToken


def extremes(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest element per share.

    Args:
        x: Any shape with at least one dim and no empty share.
        granularity: Which elements form a share.

    Returns:
        Two tensors in x's dtype with the reduced dims kept at size 1, so that they broadcast against x.
    """
    dims = _reduced_dims(granularity, x.ndim)
    return torch.amin(x, dim=dims, keepdim=True), torch.amax(x, dim=dims, keepdim=True)


def _reduced_dims(granularity: Granularity, ndim: int) -> tuple[int, ...]:
    match granularity:
        case PerTensor():
            return tuple(range(ndim))
        case PerChannel():
            return tuple(range(1, ndim))
        case PerToken():
            return (ndim - 1,)
