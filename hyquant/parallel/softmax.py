"""Attention over some of the keys, in a form that can be put together with attention over others.

    out_i = softmax(q k_i^T / sqrt(D)) v_i          lse_i = log sum exp(q k_i^T / sqrt(D))

    lse = log sum_i exp(lse_i)          out = sum_i exp(lse_i - lse) out_i

is attention over all keys, whatever way they were divided. Parts and sums are float32 (float64 for float64 inputs).

Source: Milakov and Gimelshein, arXiv:1805.02867 (the online softmax); Liu et al., arXiv:2310.01889 (around a ring).

B batch   Q query tokens   S key tokens   A heads   D head dim
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SCORES_AT_ONCE = 1 << 24
"""How many scores are held at once where attention is computed by matrix products: 64 MiB in float32."""


@dataclass(frozen=True)
class Partial:
    """Attention over some keys.

    Attributes:
        out: [B, Q, A, D] float32 or float64; zeros where there was no key.
        lse: [B, Q, A, 1], the logarithm of the softmax's denominator; -inf where there was no key.
    """

    out: Tensor
    lse: Tensor


def partial_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Partial:
    """Attend over some keys.

    Half precision on CUDA without a mask runs torch's flash kernel; all else is two matrix products, in pieces.

    Args:
        q: [B, Q, A, D].
        k: [B, S, A, D]; S may be 0.
        v: As k.
        valid: [B, S] bool, which keys may be seen; None for all.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and valid is None and k.shape[1] > 0:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(*(x.transpose(1, 2) for x in (q, k, v)))[:2]
        return Partial(out.transpose(1, 2).float(), lse.transpose(1, 2)[..., None])
    num_rows = max(1, _SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    pieces = [_by_products(rows, k, v, valid) for rows in torch.split(q, num_rows, dim=1)]
    return joined_queries(pieces)


def merged(parts: Sequence[Partial]) -> Partial:
    """Return attention over the keys of all parts, which have the same queries; the sum goes in the given order."""
    lse = torch.stack([part.lse for part in parts]).logsumexp(dim=0)
    out = torch.stack([part.out * (part.lse - _finite(lse)).exp() for part in parts]).sum(dim=0)
    return Partial(out, lse)


def joined_queries(parts: Sequence[Partial]) -> Partial:
    """Return the parts of different queries over the same keys as one."""
    return Partial(torch.cat([part.out for part in parts], dim=1), torch.cat([part.lse for part in parts], dim=1))


def of_queries(part: Partial, which: slice) -> Partial:
    """Return the part of some queries."""
    return Partial(part.out[:, which], part.lse[:, which])


def _by_products(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Partial:
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BAQD, k_BASD, v_BASD = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    scores_BAQS = (q_BAQD * q.shape[-1] ** -0.5) @ k_BASD.transpose(2, 3)
    if valid is not None:
        scores_BAQS = scores_BAQS.masked_fill(~valid[:, None, None], -torch.inf)
    lse_BAQ1 = scores_BAQS.logsumexp(dim=3, keepdim=True)
    out_BAQD = (scores_BAQS - _finite(lse_BAQ1)).exp() @ v_BASD
    return Partial(out_BAQD.transpose(1, 2), lse_BAQ1.transpose(1, 2))


def _finite(lse: Tensor) -> Tensor:
    """Return a finite number in place of the -inf of no keys, so that exp(-inf - lse) is 0 and not nan."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)
