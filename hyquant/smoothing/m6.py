"""m6, flexible smooth: activations and weights have an exponent each, both given, or both searched per layer."""

import torch
from torch import Tensor

from hyquant.config import M6
from hyquant.errors import ConfigError
from hyquant.smoothing.base import Question, ScaleSearch, UnitFacts, last_minimum
from hyquant.smoothing.loss import weight_and_input_errors

GRID = tuple(step / 20 for step in range(21))
"""The candidates of either exponent."""


def smoothing_scale(act_absmax: Tensor, weight_absmax: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Return s = act_absmax ** alpha / weight_absmax ** beta; with beta = 1 - alpha this is `m4`.

    Args:
        act_absmax: [C] float32, largest |activation| per input channel over all calibration tokens.
        weight_absmax: [C] float32, largest |weight| per input channel over all consumers.
        alpha: Exponent of the activations, in [0, 1].
        beta: Exponent of the weights, in [0, 1].

    Returns:
        [C] float32, strictly positive; 1 where either absmax is 0.

    Raises:
        ConfigError: If an exponent is outside [0, 1].

    Source: SmoothQuant (arXiv:2211.10438), eq. 4, with the exponents set free as msModelSlim's m6 has them.

    Example:
        >>> smoothing_scale(torch.tensor([8.0]), torch.tensor([4.0]), alpha=1.0, beta=0.5)
        tensor([4.])
    """
    for name, exponent in (("alpha", alpha), ("beta", beta)):
        if not 0.0 <= exponent <= 1.0:
            raise ConfigError(f"{name} must lie in [0, 1], but got {exponent}; 0.5 for both shares the range evenly.")
    scale = act_absmax.float() ** alpha / weight_absmax.float() ** beta
    return torch.where((act_absmax > 0) & (weight_absmax > 0), scale, torch.ones_like(scale))


def choose_scale(config: M6, facts: UnitFacts) -> Tensor:
    """Return the smoothing scale of given exponents; see `smoothing_scale`."""
    assert config.alpha is not None
    assert config.beta is not None
    return smoothing_scale(facts.act_absmax, facts.weight_absmax, alpha=config.alpha, beta=config.beta)


def search(config: M6, facts: UnitFacts) -> ScaleSearch:
    """Search alpha with beta = 1 - alpha, then beta with that alpha; of equal losses the later one wins.

    The loss is that of the layer's output with int8 weights per row and int8 inputs per tensor.
    """

    def scales_of(exponents: list[tuple[float, float]]) -> Tensor:
        absmax = facts.act_absmax, facts.weight_absmax
        return torch.stack([smoothing_scale(*absmax, alpha=alpha, beta=beta) for alpha, beta in exponents])

    scales = scales_of([(alpha, 1.0 - alpha) for alpha in GRID])
    losses = yield _losses(scales, facts)
    alpha = GRID[last_minimum(losses)]
    scales = scales_of([(alpha, beta) for beta in GRID])
    losses = yield _losses(scales, facts)
    return scales[last_minimum(losses)]


def _losses(scales: Tensor, facts: UnitFacts) -> Question:
    return Question(
        len(scales), lambda name, x, weight: weight_and_input_errors(x, weight, scales, *facts.ranges[name])
    )
