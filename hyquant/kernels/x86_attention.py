"""Attention on int8 q, k and v in C for x86-64 CPUs with AVX512-VNNI, in one call (`int8_attention_x86.c`).

    t = (q k^T) s_q s_k / sqrt(D)      w = round(255 exp(t - max t)), the largest t that of 256 keys
    out = sum over 256 keys at a time of (w v) s_v / sum of w, each weighed by exp of its largest t

q, k and v are int8 codes with one scale per head; both products are exact in int32, what lies between them is float32.
The softmax's numerators become 8-bit codes, as integer attention needs: against a float softmax the result moves by
about half of what quantizing q, k and v moves it (0.9 % against 1.7 % in relative L2 on normal values).

B batch   S tokens   A heads   D head dim
"""

import os

import torch
from torch import Tensor

from hyquant.kernels.selection import FORCED
from hyquant.kernels.x86_build import VNNI_BUILD, address

LARGEST_HEAD_DIM = 256

_DIRECT_DTYPES = (torch.float32, torch.bfloat16)
_OPERATORS = torch.library.Library("hyquant", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "int8_attention_x86(Tensor q, Tensor k, Tensor v, Tensor? valid, Tensor q_scale, Tensor k_scale, Tensor v_scale)"
    " -> Tensor"
)


def attends_natively(device: torch.device, head_dim: int) -> bool:
    """Return whether attention on int8 has a kernel on a device of this machine, and none other is forced."""
    forced = os.environ.get(FORCED)
    is_free = not forced or forced == VNNI_BUILD.name
    return is_free and head_dim <= LARGEST_HEAD_DIM and VNNI_BUILD.is_available(device)


def int8_attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor
) -> Tensor:
    """Return the attention of float q over k and v, all quantized on the way; see the module's formulas.

    Args:
        q: [B, S_q, A, D] in a float dtype.
        k: [B, S, A, D] in a float dtype.
        v: As k.
        valid: [B, S] bool, False for tokens that must not be seen; None if all may. A row that sees none becomes zero.
        q_scale: [A, 1] float32.
        k_scale: As `q_scale`.
        v_scale: As `q_scale`.

    Returns:
        [B, S_q, A, D] in the dtype of q.

    Raises:
        ValueError: If the shapes do not fit together or heads have more channels than the kernel takes.
    """
    _require_fitting(q, k, v, valid)
    is_direct = q.dtype == k.dtype == v.dtype and q.dtype in _DIRECT_DTYPES
    operands = (q, k, v) if is_direct else (q.float(), k.float(), v.float())
    out: Tensor = torch.ops.hyquant.int8_attention_x86(*operands, valid, q_scale, k_scale, v_scale)
    return out.to(q.dtype)


@torch.library.impl(_OPERATORS, "int8_attention_x86", "CPU")
def _int8_attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor
) -> Tensor:
    library = VNNI_BUILD.library()
    q, k, v = (x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    size_S, size_A, size_D = k.shape[1:]
    scales = [scale.float().contiguous() for scale in (q_scale, k_scale, v_scale)]
    for sample in range(q.shape[0]):
        seen = None if valid is None or bool(valid[sample].all()) else valid[sample].nonzero().reshape(-1)
        failed = library.hyq_int8_attention(
            *(address(x[sample], q.dtype) for x in (q, k, v, out)),
            address(seen, torch.int64),
            *(address(scale, torch.float32) for scale in scales),
            *(q.shape[1], size_S if seen is None else seen.numel(), size_A, size_D),
            *(q.dtype == torch.bfloat16, torch.get_num_threads()),
        )
        if failed:
            raise torch.OutOfMemoryError(f"int8 attention needs {2 * k[sample].numel()} codes, but malloc refused.")
    return out


def _require_fitting(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
    shapes = tuple(None if x is None else tuple(x.shape) for x in (q, k, v, valid))
    is_fitting = k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not is_fitting or (valid is not None and valid.shape != k.shape[:2]):
        raise ValueError(f"q, k, v and valid must fit together, but have the shapes {shapes}.")
    if q.shape[-1] > LARGEST_HEAD_DIM:
        raise ValueError(f"int8 attention takes heads of at most {LARGEST_HEAD_DIM} channels, but got {q.shape[-1]}.")


@torch.library.register_fake("hyquant::int8_attention_x86")  # type: ignore[untyped-decorator]
def _int8_attention_fake(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
