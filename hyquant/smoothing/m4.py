"""m4, iterative smooth: activation outliers move into the weights by one exponent for all channels."""

import torch
from torch import Tensor

from hyquant.config import M4
from hyquant.errors import ConfigError
from hyquant.smoothing.base import UnitFacts


def smoothing_scale(act_absmax: Tensor, weight_absmax: Tensor, *, alpha: float) -> Tensor:
    """Return the per-channel factor that moves range from activations to weights.

    s_j = act_absmax_j ** alpha / weight_absmax_j ** (1 - alpha).
    Dividing activations by s and multiplying weight columns by s leaves the float output unchanged.

    Args:
        act_absmax: [C] float32, largest |activation| per input channel over all calibration tokens.
        weight_absmax: [C] float32, largest |weight| per input channel over all consumers.
        alpha: Migration strength in [0, 1]; 0 leaves the activations' spread alone.

    Returns:
        [C] float32, strictly positive; 1 where either absmax is 0.

    Raises:
        ConfigError: If alpha is outside [0, 1].
        ValueError: If the two shapes differ; the message gives both.

    Source: SmoothQuant (arXiv:2211.10438), eq. 4.

    Example:
        >>> smoothing_scale(torch.tensor([8.0]), torch.tensor([2.0]), alpha=0.5)
        tensor([2.])
    """
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"alpha must lie in [0, 1], but got {alpha}; 0.5 shares the range evenly.")
    if act_absmax.shape != weight_absmax.shape:
        raise ValueError(
            f"both absmax must have one value per input channel, but got {tuple(act_absmax.shape)} and "
            f"{tuple(weight_absmax.shape)}."
        )
    scale = act_absmax.float() ** alpha / weight_absmax.float() ** (1 - alpha)
    return torch.where((act_absmax > 0) & (weight_absmax > 0), scale, torch.ones_like(scale))


def choose_scale(config: M4, facts: UnitFacts) -> Tensor:
    """Return the smoothing scale of a unit under a configuration; see `smoothing_scale`."""
    return smoothing_scale(facts.act_absmax, facts.weight_absmax, alpha=config.alpha)
