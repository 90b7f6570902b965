"""An orthogonal matrix that spreads the outliers of a head over all its channels, exact in every float dtype.

q and k are multiplied by the same matrix R, and since R R^T is the identity, q R (k R)^T = q k^T. An engine keeps R in
bfloat16, where the entries of a normalized Hadamard matrix, +-1 / sqrt(D), are exact only if D is a power of four:
rounded, they would scale all logits. Here R has entries that bfloat16 represents exactly for every power of two, so
the identity is exact as well.

    D = 4^m        R = signs * H_D / 2^m                                     entries +-1 / sqrt(D)
    D = 8 * 4^m    R = signs * ((I + 3 C) / 8  (x)  H_{4^m} / 2^m)           entries +-3 / (8 * 2^m), +-1 / (8 * 2^m)

H_n is the skew Hadamard matrix of Sylvester's doubling, H_2n = [[H, H], [-H^T, H^T]], and C = H_8 - I its skew part,
with C C^T = 7 I: hence (I + 3 C) (I + 3 C)^T = (1 + 9 * 7) I = 64 I. For D = 128 the largest entry is 3/32 = 0.094; the
smallest possible is 1 / sqrt(128) = 0.088. The seeded signs flip whole rows, so that no input is singled out.

Source: Ashkboos et al., arXiv:2404.00456 (QuaRot), section 4, for rotating q and k; Craigen and Kharaghani, Handbook of
Combinatorial Designs, V.1, for skew Hadamard matrices by doubling.
"""

import torch
from torch import Tensor

from hyquant.errors import ConfigError

SEED = 1234


def rotation(head_dim: int, *, seed: int = SEED) -> Tensor:
    """Return an orthogonal matrix R, [D, D] float32, whose entries bfloat16 and float16 represent exactly.

    Raises:
        ConfigError: If `head_dim` is not a power of two, or is 2.
    """
    if (problem := rotation_problem(head_dim)) is not None:
        raise ConfigError(problem)
    signs = 2.0 * torch.randint(0, 2, (head_dim, 1), generator=torch.Generator().manual_seed(seed)) - 1.0
    log2 = head_dim.bit_length() - 1
    if log2 % 2 == 0:
        return signs * (_hadamard(head_dim) * 2.0 ** -(log2 // 2))
    identity = torch.eye(8)
    nearly_flat = (identity + 3 * (_hadamard(8) - identity)) / 8
    return signs * torch.kron(nearly_flat, _hadamard(head_dim // 8) * 2.0 ** -((log2 - 3) // 2))


def rotation_problem(head_dim: int) -> str | None:
    """Return why heads of D channels cannot be rotated, None if they can."""
    if head_dim > 0 and not head_dim & (head_dim - 1) and head_dim != 2:
        return None
    return f"a rotated head must have 4, 8, 16, ... channels (a power of two), but got {head_dim}; use rotate=False."


def _hadamard(size: int) -> Tensor:
    """Return the skew Hadamard matrix of a power of two: entries +-1, orthogonal rows, ones on the diagonal."""
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), dim=1), torch.cat((-h.T, h.T), dim=1)))
    return h
