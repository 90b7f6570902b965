"""Records and statistics as entries of a store, and back."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields

from safetensors.torch import save
from torch import Tensor

from hyquant.calibration.stats import GroupStats
from hyquant.calibration.store import Entry
from hyquant.config import FrozenModel
from hyquant.models.base import Record


class _PackedRecord(FrozenModel):
    """A record with the names of its tensors in place of the tensors."""

    step_index: int
    prompt_index: int
    inputs: dict[str, str]


class _PackedRecords(FrozenModel):
    records: tuple[_PackedRecord, ...]


def pack_records(records: Sequence[Record]) -> Entry:
    """Return records as one entry; tensors that are equal in several records, such as text, are held once."""
    tensors: dict[str, Tensor] = {}
    packed: list[_PackedRecord] = []
    for record in records:
        names = {name: _content_name(tensor) for name, tensor in record.inputs.items()}
        tensors |= {names[name]: tensor for name, tensor in record.inputs.items()}
        packed.append(_PackedRecord(step_index=record.step_index, prompt_index=record.prompt_index, inputs=names))
    return Entry(tensors, _PackedRecords(records=tuple(packed)).model_dump(mode="json"))


def unpack_records(entry: Entry) -> list[Record]:
    """Undo `pack_records`; records that shared a tensor share it again."""
    return [
        Record(
            step_index=packed.step_index,
            prompt_index=packed.prompt_index,
            inputs={name: entry.tensors[tensor_name] for name, tensor_name in packed.inputs.items()},
        )
        for packed in _PackedRecords.model_validate(entry.meta).records
    ]


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


def _content_name(tensor: Tensor) -> str:
    return hashlib.sha256(save({"tensor": tensor.detach().cpu().contiguous()})).hexdigest()[:32]
