"""Statistics as entries of a store, and back."""

from collections.abc import Mapping
from dataclasses import fields

from torch import Tensor

from hyquant.calibration.histogram import Histogram
from hyquant.calibration.stats import TENSOR_FIELDS, GroupStats
from hyquant.calibration.store import Entry

_HISTOGRAM = "histogram."


def pack_stats(stats: Mapping[str, GroupStats]) -> Entry:
    """Return statistics as one entry: tensors `GROUP/FIELD`, and `GROUP/histogram.FIELD` where there are histograms."""
    tensors = {
        f"{group}/{name}": tensor
        for group, group_stats in stats.items()
        for name, tensor in _named_tensors(group_stats).items()
    }
    return Entry(tensors, {"groups": list(stats)})


def unpack_stats(entry: Entry) -> dict[str, GroupStats]:
    """Undo `pack_stats`."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(entry.tensors.items()):
        group, _, name = key.rpartition("/")
        groups.setdefault(group, {})[name] = tensor
    return {group: _stats_of_named(tensors) for group, tensors in groups.items()}


def _named_tensors(stats: GroupStats) -> dict[str, Tensor]:
    named = {each.name: getattr(stats, each.name) for each in TENSOR_FIELDS}
    if stats.histogram is None:
        return named
    return named | {_HISTOGRAM + each.name: getattr(stats.histogram, each.name) for each in fields(Histogram)}


def _stats_of_named(tensors: Mapping[str, Tensor]) -> GroupStats:
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HISTOGRAM)}
    counted = {name.removeprefix(_HISTOGRAM): tensor for name, tensor in tensors.items() if name not in plain}
    return GroupStats(**plain, histogram=Histogram(**counted) if counted else None)
