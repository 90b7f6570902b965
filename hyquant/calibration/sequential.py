"""Statistics of inputs as quantized layers upstream produce them: `QuantConfig.calibration = "sequential"`.

The denoiser's blocks B_1, B_2, ... are taken in the order they run in. The layer groups of B_k are observed over all
records while B_1 .. B_(k-1) are quantized and B_k and everything after it are in float; then B_k is quantized by what
was seen. A layer that belongs to no block is a block of its own. So a layer sees the rounding errors of all earlier
blocks, and none of its own block's.

The statistics of a block are complete, over all records and ranks, before it is quantized. Hence the result depends on
the set of records only, not on their order or on how ranks share them. msModelSlim quantizes each layer by what its
observer has seen so far, within one pass, where both matter.

Smoothing scales belong to the float model, searched or not: they say where outliers are, not how large rounding errors
have become. `needs_float_stats` says that a plan takes them, or anything else, from the float model first.

Nothing is cached: a block is observed by running the records up to it, which makes (B + 1) / 2 whole passes for B
blocks of equal cost, and once per block the first record to its end; where the range of a smoothed input does not
follow from the plain one, twice that.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from hyquant.calibration.observe import observe
from hyquant.calibration.stats import Stats
from hyquant.clock import StepClock
from hyquant.models.base import Record
from hyquant.models.names import LayerGroup
from hyquant.modules.swap import float_linear, restore_
from hyquant.plan import LayerPlan, QuantPlan
from hyquant.quantize import (
    needs_histograms,
    needs_smoothed_stats,
    needs_stats,
    quantize_,
    smoothing_multipliers,
)

Join: TypeAlias = Callable[[Callable[[], Stats]], Stats]
"""Runs a rank's own pass over its records, and returns the statistics of all ranks."""

_BLOCK = re.compile(r"(.+?\.\d+)\.")


class SequentialStats(NamedTuple):
    """What `quantize_` takes: `stats`, and as `smoothed_stats` those of multiplied inputs where they are needed."""

    stats: Stats
    smoothed_stats: Stats


def needs_sequential_stats(plan: QuantPlan) -> bool:
    """Return whether a plan's statistics are its own, from `observe_sequential`, and not those of the float model."""
    return plan.config.calibration == "sequential" and needs_stats(plan)


def needs_float_stats(plan: QuantPlan) -> bool:
    """Return whether a plan needs statistics of the float model: for its ranges, or for its smoothing scales."""
    return bool(plan.smoothed) or (needs_stats(plan) and not needs_sequential_stats(plan))


def observe_sequential(
    denoiser: nn.Module,
    plan: QuantPlan,
    records: Iterable[Record],
    clock: StepClock,
    *,
    join: Join = lambda own_pass: own_pass(),
    scales: Mapping[str, Tensor] | None = None,
) -> SequentialStats:
    """Return statistics of every quantized layer's input with all earlier blocks quantized as the plan says.

    Blocks run in the order in which the denoiser registers their modules. Attention stays in float meanwhile.

    Args:
        denoiser: The denoiser; restored to float before and after, also after an error.
        plan: What the layers become.
        records: Captured denoiser calls of this rank; iterated at least once per block.
        clock: Set to each record's step.
        join: Runs the pass it is given and merges its statistics with those of other ranks; called equally often on all
            ranks. A rank without records returns the others' without running the pass.
        scales: Smoothing scales by group name, of the float model; needed where `needs_search(plan)`, else those of
            the quantized model's own inputs unless they are given.

    Raises:
        CalibrationError: As `observe` and `quantize_`.
    """
    restore_(denoiser)
    found = SequentialStats({}, {})
    finished: list[str] = []
    try:
        for block in blocks_in_order(denoiser, plan):
            before, own = _part(plan, finished), _part(plan, [block])
            turn = _Turn(denoiser, before, own, records, clock, found, scales)
            found.stats.update(join(turn.observe))
            if needs_smoothed_stats(own):
                found.smoothed_stats.update(join(turn.observe_smoothed))
            finished.append(block)
    finally:
        restore_(denoiser)
    return found


def blocks_in_order(denoiser: nn.Module, plan: QuantPlan) -> list[str]:
    """Return the blocks with quantized layers, in the order in which the denoiser registers their modules.

    A block's name is that of its layers up to the block's number: "double_blocks.3". A layer outside of numbered blocks
    has one of its own name.

    Raises:
        LayerMatchError: If the plan was built for another denoiser.
    """
    places = {module: place for place, module in enumerate(denoiser.modules())}
    layers = sorted(plan.quantized, key=lambda layer: places[float_linear(denoiser, layer.modules[0])])
    return list(dict.fromkeys(_block_of(layer.name) for layer in layers))


@dataclass(frozen=True)
class _Turn:
    """One block's turn to be observed.

    Attributes:
        before: What is quantized meanwhile: all blocks that run earlier.
        own: What becomes of the block.
        found: The earlier blocks' statistics, then the block's own too.
        scales: Smoothing scales by group name.
    """

    denoiser: nn.Module
    before: QuantPlan
    own: QuantPlan
    records: Iterable[Record]
    clock: StepClock
    found: SequentialStats
    scales: Mapping[str, Tensor] | None

    def observe(self) -> Stats:
        """Quantize the earlier blocks and observe this one."""
        if self.before.quantized:
            stats, smoothed_stats = self.found
            quantize_(self.denoiser, self.before, stats, self.clock, smoothed_stats=smoothed_stats, scales=self.scales)
        return self._observe(self.own.quantized)

    def observe_smoothed(self) -> Stats:
        """Observe the block's smoothed inputs again, multiplied."""
        mul = smoothing_multipliers(self.denoiser, self.own, self.found.stats, scales=self.scales)
        return self._observe(self.own.smoothed, mul)

    def _observe(self, layers: Sequence[LayerPlan], mul: Mapping[str, Tensor] | None = None) -> Stats:
        groups = [LayerGroup(layer.name, layer.modules, layer.in_features, layer.out_features) for layer in layers]
        histograms = needs_histograms(self.own)
        return observe(self.denoiser, groups, self.records, self.clock, mul=mul, stop_early=True, histograms=histograms)


def _block_of(name: str) -> str:
    match = _BLOCK.match(name)
    return name if match is None else match.group(1)


def _part(plan: QuantPlan, blocks: Sequence[str]) -> QuantPlan:
    """Return the plan of some blocks' layers alone."""
    layers = tuple(layer for layer in plan.layers if _block_of(layer.name) in blocks)
    config = plan.config.model_copy(update={"attention": None})
    return plan.model_copy(update={"layers": layers, "attentions": (), "config": config})
