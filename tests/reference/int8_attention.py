"""Attention on integers in plain torch, float64 between the exact products: what kernels of int8 attention compute.

Written from the definition, token by token of the query where a kernel works by tiles.
"""

import torch
from torch import Tensor

KEYS = 256
"""Keys whose numerators share a largest one."""


def attention_on_codes(q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor, Tensor], seen: Tensor) -> Tensor:
    """Return [S, A, D] float64 for one sample: q, k and v [S, A, D] in float, scales [A] each, seen [S] bool."""
    q_codes, k_codes, v_codes = (
        (x.float() / scale[:, None]).round().clamp(-128, 127).double()
        for x, scale in zip((q, k[seen], v[seen]), scales, strict=True)
    )
    out = torch.zeros(q.shape, dtype=torch.float64)
    for head in range(q.shape[1]):
        sums = q_codes[:, head] @ k_codes[:, head].T
        logits = sums * (scales[0][head] * scales[1][head]).double() / q.shape[-1] ** 0.5
        top = logits.amax(dim=1, keepdim=True)
        above, below = (
            torch.zeros(len(q), q.shape[-1], dtype=torch.float64),
            torch.zeros(len(q), 1, dtype=torch.float64),
        )
        for start in range(0, logits.shape[1], KEYS):
            block = logits[:, start : start + KEYS]
            largest = block.amax(dim=1, keepdim=True)
            numerators = (255 * (block - largest).exp()).round()
            weight = (largest - top).exp()
            above += weight * (numerators @ v_codes[start : start + KEYS, head])
            below += weight * numerators.sum(dim=1, keepdim=True)
        out[:, head] = above / below * scales[2][head].double()
    return out
