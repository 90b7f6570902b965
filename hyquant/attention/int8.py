"""Attention on int8 q, k and v with one stored scale per head.

    s = max(|lo|, |hi|) / 127, rounded to the deployment dtype      x ~ clamp(round(x / s), -128, 127) s

Native where there is a kernel (`hyquant.kernels.x86_attention`): both products are of integers, and so are the
softmax's numerators. Else simulated: quantize, dequantize, attend in float. Then softmax and its product with v are
float, where integer operators quantize the probabilities; and what is dequantized is rounded to the model's dtype
(bfloat16: 2^-9 of each value), which integers are not.

A heads   D head dim
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hyquant.attention.stats import HeadStats
from hyquant.config import DeployDtype
from hyquant.kernels.x86_attention import attends_natively, int8_attention
from hyquant.numerics.affine import fake_quantize
from hyquant.numerics.qparams import QParams, choose_qparams

PARTS = ("fa_q", "fa_k", "fa_v")
"""Contract names of what is quantized; each has a `scale` and an `offset`."""


class Int8Attention:
    """Attention on q, k and v quantized with one scale per head, or what int8 keeps of them.

    Args:
        tensors: `fa_q.scale`, `fa_k.scale` and `fa_v.scale`, each [A, 1] float32.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.q_scale, self.k_scale, self.v_scale = (tensors[f"{part}.scale"] for part in PARTS)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return what int8 keeps of q, k and v, [B, S, A, D], in their own dtype."""
        return _kept(q, self.q_scale), _kept(k, self.k_scale), _kept(v, self.v_scale)

    @property
    def device(self) -> torch.device:
        """Return where the scales are."""
        return self.q_scale.device

    def can_attend(self, head_dim: int) -> bool:
        """Return whether int8 attention has a kernel for heads of D channels where the scales are."""
        return attends_natively(self.device, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Return the attention on int8, [B, S, A, D], in the dtype of q."""
        return int8_attention(q, k, v, valid, q_scale=self.q_scale, k_scale=self.k_scale, v_scale=self.v_scale)

    def tensors(self) -> dict[str, Tensor]:
        """Return the block's tensors under their contract names: scales [A, 1] float32, offsets [A, 1] int8 zeros."""
        scales = dict(zip(PARTS, (self.q_scale, self.k_scale, self.v_scale), strict=True))
        offsets = {f"{part}.offset": torch.zeros_like(scale, dtype=torch.int8) for part, scale in scales.items()}
        return {f"{part}.scale": scale for part, scale in scales.items()} | offsets


def int8_tensors(stats: HeadStats, deploy_dtype: DeployDtype) -> dict[str, Tensor]:
    """Return the contract tensors of a block: one symmetric scale per head, exact in the deployment dtype.

    Raises:
        CalibrationError: If an interval is not finite or its scale overflows the dtype.
    """
    scale_3A1 = choose_qparams(stats.lo, stats.hi, symmetric=True, deploy_dtype=deploy_dtype).scale[..., None]
    return Int8Attention({f"{part}.scale": scale_3A1[row].clone() for row, part in enumerate(PARTS)}).tensors()


def _kept(x_BSAD: Tensor, scale_A1: Tensor) -> Tensor:
    scale_A1 = scale_A1.to(x_BSAD.device)  # a denoiser may be moved, and its hooks are no modules
    return fake_quantize(x_BSAD, QParams(scale_A1, torch.zeros_like(scale_A1))).to(x_BSAD.dtype)
