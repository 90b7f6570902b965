"""How sure is a latency ratio? A bootstrap interval over the rounds it was measured in.

    ratio = sum over modes of (steps in it * median of its seconds) / (all steps * median of control seconds)

Rounds are resampled whole, because in each the control and every mode met the same state of the machine, and the
ratio is worked out anew. Few rounds give intervals that are too short: of three the ends are what those happened to be.

    R rounds   D draws

Source: percentile interval, Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
"""

from collections.abc import Sequence

import torch

NUM_DRAWS = 2000


def ratio_interval(
    modes: Sequence[tuple[int, Sequence[float]]],
    control_s: Sequence[float],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the low and the high end of the interval that covers a loop's latency ratio.

    Args:
        modes: Of each mode, how many steps run in it, and [R], the seconds of one in every round.
        control_s: [R], the same of the float control.
        level: Share of cases the interval is to cover, in (0, 1).
        seed: Seed of the draws.
    """
    rounds = len(control_s)
    drawn_DR = torch.randint(rounds, (NUM_DRAWS, rounds), generator=torch.Generator().manual_seed(seed))

    def medians(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[drawn_DR].quantile(0.5, dim=1)

    loop_D = torch.stack([count * medians(seconds) for count, seconds in modes]).sum(dim=0)
    ratios_D = loop_D / (sum(count for count, _ in modes) * medians(control_s))
    tail = (1.0 - level) / 2.0
    low, high = ratios_D.quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return low, high
