"""Turning a smoothing scale into what runs: a multiplier of the input, and the weight that undoes it.

The engine multiplies inputs by `mul_scale` in its own dtype. So 1 / s is rounded to that dtype first, and the weight is
divided by the rounded value: x * mul @ (W / mul)^T = x @ W^T holds exactly, whatever the rounding did to s.
"""

from torch import Tensor

from hyquant.config import DeployDtype
from hyquant.numerics.qparams import round_to, smallest_normal


def multiplier(smoothing_scale: Tensor, deploy_dtype: DeployDtype) -> Tensor:
    """Return mul = 1 / s as the deployment dtype represents it.

    Args:
        smoothing_scale: [C] float32 > 0.
        deploy_dtype: Dtype the engine keeps the multiplier in.

    Returns:
        [C] float32 > 0, clamped to where the dtype has full precision and a finite inverse.
    """
    smallest = smallest_normal(deploy_dtype)
    return round_to((1.0 / smoothing_scale.float()).clamp(smallest, 1.0 / smallest / 2), deploy_dtype)


def fold(weight: Tensor, mul: Tensor) -> Tensor:
    """Return the weight that takes inputs multiplied by `mul`: each input column divided by it.

    Args:
        weight: [N, C], any float dtype.
        mul: [C] float32 > 0.

    Returns:
        [N, C] float32.
    """
    return weight.float() / mul
