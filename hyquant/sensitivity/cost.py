"""How many forwards of a denoiser its probes take, with kept blocks and without.

With blocks b = 1 .. B of cost c_b, in parts of a forward, and bands i that begin in block b_i, each record takes

    without kept blocks   1 + number of bands
    with them             1 + sum over b < max b_i of c_b + sum over i of (c_(b_i) + ... + c_B)

The 1 is the float output; the second term brings the kept outputs from block to block. What lies outside of the blocks
(embeddings, the final layer) runs in every call and is not counted. That kept blocks change nothing is checked once, on
the first record, behind every block that is kept up to: the second term again, and c_b + ... + c_B for each b > 1 in
which a band begins.
"""

from collections.abc import Mapping, Sequence

from hyquant.config import FrozenModel
from hyquant.sensitivity.bands import LayerBand


class ProbeCost(FrozenModel):
    """Forwards that a map takes; `whole` if every call ran whole, `kept` with outputs of earlier blocks kept."""

    whole: float
    kept: float


def probe_cost(
    blocks: Sequence[str], bands: Sequence[LayerBand], *, num_records: int, weights: Mapping[str, float] | None = None
) -> ProbeCost:
    """Return how many forwards a map takes.

    Args:
        blocks: Canonical names of all blocks in the order they run in; none if the denoiser has none.
        bands: What is probed.
        num_records: Denoiser calls that each band is probed on.
        weights: What each block costs, in any unit; equal costs unless given.
    """
    whole = num_records * (1.0 + len(bands))
    if not blocks:
        return ProbeCost(whole=whole, kept=whole)
    costs = [1.0 if weights is None else weights[block] for block in blocks]
    total = sum(costs)
    starts = [0 if band.first_block is None else blocks.index(band.first_block) for band in bands]
    chain = sum(costs[: max(starts)]) / total
    behind = sum(sum(costs[start:]) / total for start in starts)
    check = chain + sum(sum(costs[start:]) / total for start in set(starts) - {0})
    return ProbeCost(whole=whole, kept=num_records * (1.0 + chain + behind) + check)
