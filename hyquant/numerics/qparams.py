"""Choosing scale and zero point of int8 and int4 from a range, in float32, as the deployment dtype can represent them.

    symmetric    s = max(|lo|, |hi|) / 127                                 z = 0
    int4         s = max(hi / 7, -lo / 8)                                  z = 0
    asymmetric   lo' = min(lo, 0)  hi' = max(hi, 0)  s = (hi' - lo') / 255    z = -128 - round(lo' / s)

`round` is half to even. The engine that loads an export casts scales to its own dtype, so a scale is rounded to
that dtype first and everything else (zero point, weights, dequantization) is derived from the rounded value.
Rounding is to nearest, not up: a bf16 scale is off by at most one part in 2^8, so a symmetric extreme lands at most
127 / 2^8 < 0.5 steps above 127 and still rounds to it within half a step; only an asymmetric extreme can lose more, one
and a half steps at worst. Rounding up would save that one value and make every step coarser by up to 0.8 %.
Source: Jacob et al., arXiv:1712.05877, section 2.1 (affine quantization).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hyquant.config import DeployDtype
from hyquant.errors import CalibrationError

SCALE_FLOOR = 2.0**-23
"""Smallest scale: float32's epsilon, also representable (as a subnormal) in float16."""

_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class QParams(NamedTuple):
    """Scale and zero point: x ≈ (q - zero_point) * scale. Both float32, of one shape; the zero point holds integers."""

    scale: Tensor
    zero_point: Tensor


def choose_qparams(lo: Tensor, hi: Tensor, *, symmetric: bool, deploy_dtype: DeployDtype = "float32") -> QParams:
    """Return the int8 scale and zero point for ranges.

    Args:
        lo: Smallest values, any shape; float32 arithmetic is used.
        hi: Largest values, same shape.
        symmetric: Whether the zero point is 0.
        deploy_dtype: Dtype in which the scale must be exactly representable.

    Returns:
        Scale and zero point, shaped as lo. The scale is at least 2^-23, and 1 for an all-zero range, which any scale
        represents.

    Raises:
        CalibrationError: If a range is not finite, is upside down, or its scale overflows `deploy_dtype`.
    """
    lo32, hi32 = _checked_range(lo, hi)
    if symmetric:
        scale = _safe_scale(torch.maximum(lo32.abs(), hi32.abs()) / 127, deploy_dtype)
        return QParams(scale, torch.zeros_like(scale))
    lo32, hi32 = lo32.clamp(max=0), hi32.clamp(min=0)
    scale = _safe_scale((hi32 - lo32) / 255, deploy_dtype)
    return QParams(scale, (-128 - torch.round(lo32 / scale)).clamp(-128, 127))


def choose_int4_qparams(lo: Tensor, hi: Tensor, *, deploy_dtype: DeployDtype = "float32") -> QParams:
    """Return the int4 scale for ranges, without a zero point; all of the 16 codes from -8 to 7 are used.

    Args:
        lo: Smallest values, any shape.
        hi: Largest values, same shape.
        deploy_dtype: Dtype in which the scale must be exactly representable.

    Returns:
        Scale and zero point (0), shaped as lo; see `choose_qparams` for the least scale and that of an all-zero range.

    Raises:
        CalibrationError: As `choose_qparams`.
    """
    lo32, hi32 = _checked_range(lo, hi)
    scale = _safe_scale(torch.maximum(hi32 / 7, lo32 / -8).clamp(min=0), deploy_dtype)
    return QParams(scale, torch.zeros_like(scale))


def round_to(value: Tensor, deploy_dtype: DeployDtype) -> Tensor:
    """Round to the nearest values that a dtype can represent, and keep them in float32.

    Raises:
        CalibrationError: If a finite value overflows the dtype.
    """
    rounded = value.to(_DTYPES[deploy_dtype]).float()
    if not bool(torch.isfinite(rounded).all()):
        raise CalibrationError(
            f"scales must be representable in {deploy_dtype}, but the largest is {value.abs().amax().item():.3g}; "
            "deploy in bfloat16 or leave the layer in float."
        )
    return rounded


def smallest_normal(deploy_dtype: DeployDtype) -> float:
    """Return the smallest positive number that a dtype represents with full precision."""
    return float(torch.finfo(_DTYPES[deploy_dtype]).tiny)


def _checked_range(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    lo32, hi32 = lo.float(), hi.float()
    if not bool((torch.isfinite(lo32) & torch.isfinite(hi32) & (lo32 <= hi32)).all()):
        raise CalibrationError(
            f"a range must be finite with lo <= hi, but got lo down to {lo32.amin().item()} and hi up to "
            f"{hi32.amax().item()}; check the calibration records."
        )
    return lo32, hi32


def _safe_scale(scale: Tensor, deploy_dtype: DeployDtype) -> Tensor:
    floored = scale.clamp(min=SCALE_FLOOR)
    return round_to(torch.where(scale == 0, torch.ones_like(scale), floored), deploy_dtype)
