"""Probing: one band of layers quantized, everything else in float, on the inputs of a float rendering.

The denoiser gets the float trajectory's latents at each probed step (teacher forcing), so a probe costs one forward, or
less with kept blocks (`hyquant.sensitivity.prefix`), and not a rendering. It tells what a band does to one prediction.
How errors of several steps and bands add up it does not tell.

    relative L2 = ||quantized output - float output|| / ||float output||
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyquant.calibration.calls import replay
from hyquant.calibration.stats import GroupStats
from hyquant.clock import StepClock
from hyquant.config import LayerSelection, LinearScheme, QuantConfig
from hyquant.errors import CalibrationError
from hyquant.models.base import Record
from hyquant.models.names import LayerGroup
from hyquant.plan import QuantPlan, build_plan
from hyquant.quantize import quantize_, restore_
from hyquant.sensitivity.bands import LayerBand, place_of
from hyquant.sensitivity.map import Measurement
from hyquant.sensitivity.prefix import Call, float_pass, is_chain, output_behind, outputs_after


class Prober:
    """Probes bands of one denoiser.

    Args:
        denoiser: The denoiser; in float before and after every measurement.
        groups: All its layer groups.
        bands: What to probe.
        clock: Set to each record's step.
        scheme: What a band is quantized to.
        num_steps: Steps of the rendering that records come from.
        stats: Statistics by group name where the scheme stores ranges.
        keep_blocks: Whether to keep the outputs of earlier blocks where the denoiser lets us.

    Attributes:
        keeps_blocks: Whether outputs of earlier blocks are kept; None before the first record, which tells.

    Raises:
        ConfigError: If a band cannot be quantized so.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        groups: Sequence[LayerGroup],
        bands: Sequence[LayerBand],
        clock: StepClock,
        *,
        scheme: LinearScheme,
        num_steps: int,
        stats: Mapping[str, GroupStats] | None = None,
        keep_blocks: bool = True,
    ) -> None:
        self.keeps_blocks: bool | None = None if keep_blocks else False
        self._denoiser = denoiser
        self._clock = clock
        self._stats = stats or {}
        self._paths = {group.name: group.modules[0] for group in groups}
        self._plans = [(band, _plan(groups, band, scheme, num_steps)) for band in bands]

    def measure(
        self, records: Iterable[Record], *, known: Collection[tuple[int, int, str, str]] = ()
    ) -> Iterator[Measurement]:
        """Yield one measurement per record and band, as each is done.

        Args:
            records: Denoiser calls of the float rendering.
            known: Keys of measurements that there are; they are left out.

        Raises:
            CalibrationError: If the float output is not finite.
        """
        restore_(self._denoiser)
        try:
            for record in records:
                left = [
                    (band, plan)
                    for band, plan in self._plans
                    if (record.prompt_index, record.step_index, band.block, band.kind) not in known
                ]
                if left or self.keeps_blocks is None:
                    yield from self._probe(record, left)
        finally:
            restore_(self._denoiser)

    def _probe(self, record: Record, left: Sequence[tuple[LayerBand, QuantPlan]]) -> Iterator[Measurement]:
        self._clock.set(record.step_index)
        call = partial(replay, self._denoiser, record, next(self._denoiser.parameters()).device)
        seen = float_pass(self._denoiser, _block_paths(self._paths.values()), call)
        reference = _sum_of_squares(seen.output)
        if reference is None:
            raise CalibrationError(
                f"the float output must be finite, but it is not at step {record.step_index}; run the float model in a "
                "wider dtype or check its weights."
            )
        if self.keeps_blocks is None:
            able = _KeptBlocks(self._denoiser, seen.blocks, call)
            counts = [able.place(self._paths[band.layers[0]]) for band, _ in self._plans]
            self.keeps_blocks = is_chain(self._denoiser, seen, counts, call)
        kept = _KeptBlocks(self._denoiser, seen.blocks if self.keeps_blocks else (), call)
        for band, plan in sorted(left, key=lambda entry: kept.place(self._paths[entry[0].layers[0]])):
            kept.advance_to(self._paths[band.layers[0]])
            quantize_(self._denoiser, plan, self._stats, self._clock)
            try:
                output = kept.output()
            finally:
                restore_(self._denoiser)
            yield Measurement(
                prompt_index=record.prompt_index,
                step_index=record.step_index,
                block=band.block,
                kind=band.kind,
                error=_sum_of_squares(output.float() - seen.output.float()),
                reference=reference,
            )


@dataclass
class _KeptBlocks:
    """Outputs of the blocks before the one that a probe begins in, brought forward as probes go on."""

    denoiser: nn.Module
    blocks: tuple[str, ...]
    call: Call
    count: int = 0
    outputs: dict[str, Any] = field(default_factory=dict)

    def place(self, path: str) -> int:
        """Return how many blocks run before the one that holds a module; 0 where none can be kept."""
        place = place_of(path)
        return self.blocks.index(place.block) if place is not None and place.block in self.blocks else 0

    def advance_to(self, path: str) -> None:
        """Keep the outputs of all blocks before the one that holds a module. The denoiser must be in float."""
        count = self.place(path)
        if count > self.count:
            done, more = self.blocks[: self.count], self.blocks[self.count : count]
            self.outputs = outputs_after(self.denoiser, done, self.outputs, more, self.call)
            self.count = count

    def output(self) -> Tensor:
        """Return the denoiser's output behind what is kept."""
        return output_behind(self.denoiser, self.blocks[: self.count], self.outputs, self.call)


def _plan(groups: Sequence[LayerGroup], band: LayerBand, scheme: LinearScheme, num_steps: int) -> QuantPlan:
    config = QuantConfig(linear=scheme, layers=LayerSelection(include=band.layers))
    return build_plan(groups, config, num_steps=num_steps)


def _block_paths(paths: Iterable[str]) -> list[str]:
    places = (place_of(path) for path in paths)
    return list(dict.fromkeys(place.block for place in places if place is not None))


def _sum_of_squares(x: Tensor) -> float | None:
    """Return the sum of squares in float64, None if it is not finite."""
    total = float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
    return total if torch.isfinite(x).all() else None
