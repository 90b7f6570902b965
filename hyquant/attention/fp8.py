"""Attention on float8 q, k and v with a scale per block of tokens, simulated: quantize, dequantize, attend in float.

A block is 128 tokens of q or 256 tokens of k or v, of one head, by up to 128 channels:

    s = max |x over the block| / 448           x ~ e4m3(x / s) s

e4m3 has 3 bits after the leading one and reaches 448: a value loses at most 2^-4 of itself, or 2^-10 s if it is below
2^-6 s. Scales are computed from each input, so nothing is stored but the rotation (`hyquant.attention.rotation`).

Limits: softmax and its product with v are float. Padded tokens take part in their block, as in the operator.

Source: torch_npu `npu_dynamic_block_quant` and how MindIE-SD 3.1 calls it; OCP 8-bit floating point specification.

B batch   S tokens   A heads   D head dim
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from hyquant.attention.rotation import rotation
from hyquant.config import DeployDtype

Q_ROWS, KV_ROWS = 128, 256
COLUMNS = 128
E4M3_MAX = 448.0


class Fp8Attention:
    """Fake quantization of q, k and v in float8, q and k rotated first.

    Args:
        tensors: `q_rot` and `k_rot`, each [D, D], with q_rot k_rot^T the identity.
    """

    needs_all_tokens = True
    """Blocks of tokens share a scale, and a block may lie on two ranks."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.q_rot, self.k_rot = tensors["q_rot"], tensors["k_rot"]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return what float8 keeps of rotated q and k and of v, [B, S, A, D], in their own dtype."""
        q, k = q @ self.q_rot.to(q), k @ self.k_rot.to(k)
        return kept_in_blocks(q, Q_ROWS), kept_in_blocks(k, KV_ROWS), kept_in_blocks(v, KV_ROWS)

    def tensors(self) -> dict[str, Tensor]:
        """Return the block's tensors under their contract names."""
        return {"q_rot": self.q_rot, "k_rot": self.k_rot}


def fp8_tensors(head_dim: int, deploy_dtype: DeployDtype, *, rotate: bool) -> dict[str, Tensor]:
    """Return the contract tensors of a block: the rotation in the deployment dtype, once for q and once for k.

    Without rotation they are the identity, because MindIE-SD 3.1 refuses float8 attention that lacks them.

    Raises:
        ConfigError: If heads of this size cannot be rotated.
    """
    matrix = (rotation(head_dim) if rotate else torch.eye(head_dim)).to(getattr(torch, deploy_dtype))
    return {"q_rot": matrix, "k_rot": matrix.clone()}


def kept_in_blocks(x_BSAD: Tensor, rows: int) -> Tensor:
    """Return what e4m3 keeps of a tensor with one scale per block of `rows` tokens of a head.

    Args:
        x_BSAD: Any float dtype; the last block of tokens and of channels may be smaller.
        rows: Tokens per block.

    Returns:
        x's shape and dtype.
    """
    size_B, size_S, size_A, size_D = x_BSAD.shape
    columns = min(COLUMNS, size_D)
    padded = F.pad(x_BSAD.float(), (0, -size_D % columns, 0, 0, 0, -size_S % rows))
    blocks = padded.reshape(size_B, padded.shape[1] // rows, rows, size_A, padded.shape[3] // columns, columns)
    absmax = blocks.abs().amax(dim=(2, 5), keepdim=True)
    scale = torch.where(absmax == 0, 1.0, absmax / E4M3_MAX)
    codes = (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    kept = (codes.float() * scale).reshape(padded.shape)
    return kept[:, :size_S, :, :size_D].to(x_BSAD.dtype)
