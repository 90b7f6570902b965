"""Searched smoothing scales of a study: found once per group and smoothing, then kept in memory and in the store.

A scale depends on the model, the calibration prompts, the group and how it is smoothed, and neither on the scheme nor
on which other layers a config selects. So each group (or pair that must share a scale) is an entry of its own, and a
trial searches only what no trial has searched before.
"""

from collections.abc import Iterable
from functools import partial

from pydantic import JsonValue
from torch import Tensor

from hyquant.config import digest
from hyquant.distributed import add_sums
from hyquant.models.base import Record
from hyquant.plan import QuantPlan
from hyquant.quantize import needs_search
from hyquant.smoothing.search import PlanSearch, Sums, Unit
from search.stages import Stages
from search.workbench import Workbench, stats_key


def prepare_scales(bench: Workbench, plan: QuantPlan, stages: Stages) -> dict[str, Tensor] | None:
    """Return the searched smoothing scales of a plan by group name, None if it needs none. Collective.

    The denoiser must be in float, and the statistics must be there.

    Raises:
        TrialFailed: On every rank, if one rank cannot search.
    """
    if not needs_search(plan):
        return None
    units = {_key(bench, plan, unit): unit for unit in plan.smoothing_units}
    own_missing = stages.run("calibrate", lambda: _load(bench, units))
    somewhere_missing = {
        key for keys in bench.group.all_gather([*own_missing]) if isinstance(keys, list) for key in keys
    }
    missing = {key: unit for key, unit in units.items() if key in somewhere_missing}
    if missing:
        found = _search(bench, plan, list(missing.values()), stages)
        for key, unit in missing.items():
            bench.scales[key] = found[unit[0].name]
        stages.run("calibrate", lambda: _store(bench, missing))
    return {layer.name: bench.scales[key] for key, unit in units.items() for layer in unit}


def _search(bench: Workbench, plan: QuantPlan, units: list[Unit], stages: Stages) -> dict[str, Tensor]:
    search = stages.run("calibrate", lambda: PlanSearch(bench.model.denoiser, plan, bench.stats, units))
    while not search.is_done:
        own = stages.run("calibrate", lambda: _measure_shard(bench, search))
        with stages.timed("calibrate"):
            total = add_sums(own, bench.group)
        stages.run("calibrate", partial(search.tell, total))
    return search.scales


def _measure_shard(bench: Workbench, search: PlanSearch) -> Sums:
    """Return sums over this rank's records; measurements may pass between two records. No collective call."""
    with bench.lock.computing():
        is_needed = bench.has_first_record if search.takes_first_record else bool(bench.calibration)
        records: Iterable[Record] = bench.records() if is_needed else ()
        return search.measure(records, bench.model.clock)


def _load(bench: Workbench, units: dict[str, Unit]) -> list[str]:
    """Read what the store has into memory, and return the keys it lacks."""
    for key in units:
        entry = None if key in bench.scales else bench.cache.get(key)
        if entry is not None:
            bench.scales[key] = entry.tensors["scale"]
    return [key for key in units if key not in bench.scales]


def _store(bench: Workbench, units: dict[str, Unit]) -> None:
    if bench.group.rank == 0:
        for key, unit in units.items():
            bench.cache.keep(key, {"scale": bench.scales[key]}, {"groups": [layer.name for layer in unit]})


def _key(bench: Workbench, plan: QuantPlan, unit: Unit) -> str:
    assert plan.config.smoothing is not None
    identity: dict[str, JsonValue] = {
        "stats": stats_key(bench),
        "smoothing": plan.config.smoothing.model_dump(mode="json", exclude={"layers", "placement"}),
        "groups": [layer.name for layer in unit],
    }
    return f"scale-{digest(identity, length=32)}"
