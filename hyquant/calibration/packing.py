"""Statistics as entries of a store, and back."""

from collections.abc import Mapping
from dataclasses import fields

from hyquant.calibration.stats import GroupStats
from hyquant.calibration.store import Entry


def pack_stats(stats: Mapping[str, GroupStats]) -> Entry:
    """Return statistics as one entry: tensors `GROUP/FIELD`."""
    tensors = {
        f"{group}/{field.name}": getattr(group_stats, field.name)
        for group, group_stats in stats.items()
        for field in fields(group_stats)
    }
    return Entry(tensors, {"groups": list(stats)})


def unpack_stats(entry: Entry) -> dict[str, GroupStats]:
    """Undo `pack_stats`."""
    names = [field.name for field in fields(GroupStats)]
    groups = dict.fromkeys(key.rpartition("/")[0] for key in entry.tensors)
    return {group: GroupStats(**{name: entry.tensors[f"{group}/{name}"] for name in names}) for group in sorted(groups)}
