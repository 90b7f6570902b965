"""m3, activation-aware scaling: channels that are large on average get finer int8 weights, by a searched power.

Source: Lin et al., AWQ, arXiv:2306.00978, section 3.2 (the scale is a power of the mean magnitude, found on a grid);
the normalisation and the floor are those of the authors' published code, and the grid of 20 powers as well.
"""

import torch
from torch import Tensor

from hyquant.config import M3
from hyquant.smoothing.base import Question, ScaleSearch, UnitFacts, first_minimum
from hyquant.smoothing.loss import weight_errors

POWERS = tuple(step / 20 for step in range(20))
"""The candidates' powers; the first leaves every channel as it is."""

_FLOOR = 1e-4


def candidate_scales(act_mean: Tensor) -> Tensor:
    """Return the smoothing scale of every power.

    s_r = max(act_mean ** r, 1e-4), divided by sqrt(max_c s_r * min_c s_r).

    Args:
        act_mean: [C], mean |activation| per input channel; channels where it is 0 keep scale 1 and do not count in
            the normalisation.

    Returns:
        [P, C] float32 > 0, one row per entry of `POWERS`.
    """
    is_live = act_mean > 0
    if not bool(is_live.any()):
        return torch.ones(len(POWERS), len(act_mean), device=act_mean.device)
    scales = []
    for power in POWERS:
        raised = (act_mean.double() ** power).clamp(min=_FLOOR)
        live = raised[is_live]
        scale = raised / (live.amax() * live.amin()).sqrt()
        scales.append(torch.where(is_live, scale, torch.ones_like(scale)))
    return torch.stack(scales).float()


def search(config: M3, facts: UnitFacts) -> ScaleSearch:
    """Search the power that loses least in the layer's output when only the weights are int8; the first of equals.

    Two passes: mean magnitudes, then losses. `config.records` is obeyed by whoever replays the records.
    """
    num_channels = len(facts.act_absmax)
    sums = yield Question(num_channels + 1, _magnitudes)
    scales = candidate_scales(sums[:-1] / sums[-1])
    losses = yield Question(len(scales), lambda name, x, weight: weight_errors(x, weight, scales))
    return scales[first_minimum(losses)]


def _magnitudes(name: str, x_MC: Tensor, weight_NC: Tensor) -> Tensor:
    """Return sum |x| per channel and, last, the number of rows."""
    num_rows = torch.tensor([len(x_MC)], dtype=torch.float64, device=x_MC.device)
    return torch.cat((x_MC.abs().sum(dim=0, dtype=torch.float64), num_rows))
