"""Searching smoothing scales over calibration records: passes that answer what the searches of all units ask.

The units' searches (`hyquant.smoothing.base.ScaleSearch`) run side by side: one pass over the records answers the
question each of them has open. Inputs of several records are collected and measured together, as a candidate's weights
take as long to quantize for one record as for many; where those of all records fit, later questions are answered from
them without another pass. A pass of one rank gives float64 sums, which add up over ranks, and every rank is told the
same total, so all choose alike.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hyquant.calibration.calls import replay
from hyquant.calibration.early_end import EarlyEnd
from hyquant.calibration.kept import KEPT_BYTES
from hyquant.calibration.stats import GroupStats, select_steps
from hyquant.clock import StepClock
from hyquant.errors import CalibrationError
from hyquant.models.base import Record
from hyquant.modules.swap import float_linear
from hyquant.needs import searches_first_record
from hyquant.plan import LayerPlan, QuantPlan
from hyquant.smoothing import SMOOTHINGS
from hyquant.smoothing.base import Question, ScaleSearch, UnitFacts

logger = logging.getLogger(__name__)


Unit = tuple[LayerPlan, ...]
Sums = dict[str, Tensor]
"""Float64 answers, and last the number of calls, by the name of a unit's first group; they add up over ranks."""

Inputs = dict[tuple[str, LayerPlan], list[Tensor]]
"""Inputs [M, C] float32 of calls, by the name of a unit's first group and the group they are of."""


class PlanSearch:
    """The open searches of a plan's units; measure a pass, tell the total over ranks, until `is_done`.

    Args:
        denoiser: The float denoiser.
        plan: A plan for which `needs_search` holds.
        stats: Statistics of plain inputs by group name.
        units: The units to search, of `plan.smoothing_units`; all if None.
        inputs: Inputs [M, C] float32 of this rank's calls by group name, if an earlier pass has kept them all; then no
            other is made. Not used where only the first record counts.

    Attributes:
        scales: Smoothing scale [C] float32 by group name, of the searches that have ended.
        takes_first_record: Whether only the first record of all ranks counts.

    Raises:
        CalibrationError: If a smoothed group has no statistics.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        plan: QuantPlan,
        stats: Mapping[str, GroupStats],
        units: Sequence[Unit] | None = None,
        inputs: Mapping[str, list[Tensor]] | None = None,
    ) -> None:
        config = plan.config.smoothing
        assert config is not None
        search = SMOOTHINGS[config.kind].search
        assert search is not None
        self.scales: dict[str, Tensor] = {}
        self.takes_first_record = searches_first_record(plan)
        self._denoiser = denoiser
        self._units = {unit[0].name: unit for unit in (plan.smoothing_units if units is None else units)}
        self._inputs: Inputs | None = None
        if inputs is not None and not self.takes_first_record:
            self._inputs = {(name, layer): inputs[layer.name] for name, unit in self._units.items() for layer in unit}
        self._open: dict[str, tuple[ScaleSearch, Question]] = {}
        for name, unit in self._units.items():
            running = search(config, unit_facts(unit, stats, self._weight_absmax))
            self._open[name] = (running, next(running))

    @property
    def is_done(self) -> bool:
        """Say whether every search has ended."""
        return not self._open

    def measure(self, records: Iterable[Record], clock: StepClock) -> Sums:
        """Return the answers to the open questions over some records: zeros without a record. No collective call.

        With `takes_first_record` only the first of these records is looked at; ranks that do not have the first of all
        must give none.
        """
        device = next(self._denoiser.parameters()).device
        sums = {
            name: torch.zeros(question.size + 1, dtype=torch.float64, device=device)
            for name, (_, question) in self._open.items()
        }
        with torch.inference_mode():
            if self._inputs is None:
                self._inputs = self._collect(records, clock, sums)
            else:
                self._add(sums, self._inputs)
        return sums

    def tell(self, sums: Mapping[str, Tensor]) -> None:
        """Answer the open questions by the sums over all ranks.

        Raises:
            CalibrationError: If they are not finite, or there was no record.
        """
        device = next(self._denoiser.parameters()).device
        asked, self._open = self._open, {}
        for name, (running, _) in asked.items():
            try:
                self._open[name] = (running, running.send(_usable(name, sums[name]).to(device)))
            except StopIteration as end:
                self.scales |= dict.fromkeys((layer.name for layer in self._units[name]), end.value)
        logger.info("smoothing search answered=%d open=%d", len(asked), len(self._open))

    def _collect(self, records: Iterable[Record], clock: StepClock, sums: Sums) -> Inputs | None:
        """Run a pass and add up its answers; return the inputs of all records if they fit."""
        device = next(self._denoiser.parameters()).device
        inputs: Inputs = {}
        size_bytes = 0
        is_complete = True
        early_end = EarlyEnd()

        def note(unit_name: str, layer: LayerPlan, x: Tensor) -> None:
            nonlocal size_bytes, is_complete
            rows = x.reshape(-1, x.shape[-1]).to(torch.float32, copy=True)
            inputs.setdefault((unit_name, layer), []).append(rows)
            size_bytes += rows.numel() * rows.element_size()
            if size_bytes > KEPT_BYTES:
                self._add(sums, inputs)
                inputs.clear()
                size_bytes, is_complete = 0, False
            early_end.saw(layer.name)

        with self._watched(note):
            for record in islice(records, 1 if self.takes_first_record else None):
                clock.set(record.step_index)
                with early_end.call():
                    replay(self._denoiser, record, device)
        self._add(sums, inputs)
        return inputs if is_complete else None

    def _add(self, sums: Sums, inputs: Inputs) -> None:
        """Add what the open questions ask of some inputs."""
        for (unit_name, layer), calls in inputs.items():
            if calls and unit_name in self._open:
                _, question = self._open[unit_name]
                weight = _stacked_weight(self._denoiser, layer)
                sums[unit_name][:-1] += question.measure(layer.name, torch.cat(calls), weight)
                sums[unit_name][-1] += len(calls)

    def _weight_absmax(self, path: str) -> Tensor:
        return column_absmax(float_linear(self._denoiser, path).weight)

    @contextmanager
    def _watched(self, note: Callable[[str, LayerPlan, Tensor], None]) -> Iterator[None]:
        def hook_for(unit_name: str, layer: LayerPlan) -> Any:
            return lambda module, args: note(unit_name, layer, args[0])

        handles = [
            self._denoiser.get_submodule(layer.modules[0]).register_forward_pre_hook(hook_for(name, layer))
            for name in self._open
            for layer in self._units[name]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def search_scales(
    denoiser: nn.Module,
    plan: QuantPlan,
    stats: Mapping[str, GroupStats],
    records: Sequence[Record],
    clock: StepClock,
    *,
    merge: Callable[[Sums], Mapping[str, Tensor]] = dict,
    inputs: Mapping[str, list[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Search the smoothing scales of a plan; for `quantize_(..., scales=...)`.

    Args:
        denoiser: The float denoiser; without `inputs` it runs over the records once per question of the search (twice
            for m3 and m6).
        plan: A plan for which `needs_search` holds.
        stats: Statistics of plain inputs of all ranks by group name.
        records: This rank's records. Where the configuration looks at the first record only, ranks that do not have it
            must give none.
        clock: Set to each record's step.
        merge: Joins the sums of all ranks by adding them; called once per pass, also where there are no records.
        inputs: As for `PlanSearch`.

    Returns:
        [C] float32 > 0 by name of the smoothed group; the same however the records are cut over ranks.

    Raises:
        CalibrationError: If statistics or records are missing, or losses are not finite.
    """
    search = PlanSearch(denoiser, plan, stats, inputs=inputs)
    while not search.is_done:
        search.tell(merge(search.measure(records, clock)))
    return search.scales


def column_absmax(weight: Tensor) -> Tensor:
    """Return the largest magnitude per input channel of a weight [N, C], or of some of its rows: [C] float32."""
    return weight.detach().abs().amax(dim=0).float()


def unit_facts(unit: Unit, stats: Mapping[str, GroupStats], weight_absmax_of: Callable[[str], Tensor]) -> UnitFacts:
    """Return what statistics and weights say about groups that share a smoothing scale, on the weights' device.

    Args:
        unit: The groups.
        stats: Statistics of plain inputs by group name.
        weight_absmax_of: Module path -> `column_absmax` of its weight.

    Raises:
        CalibrationError: If a group has no statistics.
    """
    weight_absmax = torch.stack([weight_absmax_of(path) for layer in unit for path in layer.modules]).amax(dim=0)
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in unit:
        if layer.name not in stats:
            raise CalibrationError(
                f"{layer.name} must have calibration statistics, but there are none; observe records with this group."
            )
        seen = select_steps(stats[layer.name], None)
        ranges[layer.name] = (
            seen.lo.amin(dim=0).to(weight_absmax.device),
            seen.hi.amax(dim=0).to(weight_absmax.device),
        )
    act_absmax = torch.stack([bound.abs() for pair in ranges.values() for bound in pair]).amax(dim=0)
    return UnitFacts(act_absmax=act_absmax, weight_absmax=weight_absmax, ranges=ranges)


def _stacked_weight(denoiser: nn.Module, layer: LayerPlan) -> Tensor:
    return torch.cat([float_linear(denoiser, path).weight.float() for path in layer.modules])


def _usable(name: str, total: Tensor) -> Tensor:
    """Return the answer in a unit's sums."""
    if total[-1] == 0:
        raise CalibrationError(
            f"a smoothing search must see records, but none reached {name}; capture at least one prompt."
        )
    if not bool(torch.isfinite(total).all()):
        raise CalibrationError(
            f"what a smoothing search sums up must be finite, but is not for {name}; run the float model in a wider "
            "dtype, or leave the layer out of the smoothing."
        )
    return total[:-1]
