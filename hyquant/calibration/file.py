"""What calibration found, as one file: safetensors with its description in the metadata; nothing is ever unpickled.

    stats/GROUP/FIELD      smoothed/GROUP/FIELD     (`hyquant.calibration.packing`)
    heads/BLOCK/FIELD      scales/GROUP

Statistics are read group by group when they are asked for, because those of a large model fill hundreds of megabytes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hyquant.attention.stats import HeadStats, pack_head_stats, unpack_head_stats
from hyquant.calibration.calibrate import Calibrated
from hyquant.calibration.packing import pack_stats, unpack_stats
from hyquant.calibration.sequential import needs_sequential_stats
from hyquant.calibration.stats import GroupStats
from hyquant.calibration.store import Entry, fill_atomically
from hyquant.config import FrozenModel, QuantConfig
from hyquant.errors import CalibrationError
from hyquant.needs import needs_attention_stats, needs_search, needs_smoothed_stats
from hyquant.plan import QuantPlan

_METADATA = "hyq_calibration"

Value = TypeVar("Value")


class CalibrationInfo(FrozenModel):
    """What statistics are of.

    Attributes:
        config: What they were gathered for.
        num_steps: Denoising steps of the records.
        denoiser: Digest of the float denoiser's weights.
        dtype: The dtype it ran in.
    """

    format_version: Literal[1] = 1
    config: QuantConfig
    num_steps: int
    denoiser: str
    dtype: str


@dataclass(frozen=True)
class SavedCalibration:
    """A file of statistics that is open: each entry is read when it is asked for.

    Attributes:
        path: The file.
        info: What it is of.
        channels: Input channels by group.
        found: What calibration found.
    """

    path: Path
    info: CalibrationInfo
    channels: Mapping[str, int]
    found: Calibrated


class _Lazy(Mapping[str, Value], Generic[Value]):
    """Entries of a file, read one by one."""

    def __init__(self, names: list[str], read: Callable[[str], Value]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_calibrated(path: Path, found: Calibrated, info: CalibrationInfo) -> None:
    """Write a file of statistics, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    parts: dict[str, Mapping[str, Tensor]] = {
        "stats": pack_stats(found.stats).tensors,
        "smoothed": {} if found.smoothed_stats is None else pack_stats(found.smoothed_stats).tensors,
        "heads": {} if found.attention_stats is None else pack_head_stats(found.attention_stats),
        "scales": found.scales or {},
    }
    tensors = {
        f"{part}/{key}": tensor.detach().cpu().contiguous()
        for part, own in parts.items()
        for key, tensor in own.items()
    }
    payload = save(tensors, metadata={_METADATA: info.model_dump_json()})
    fill_atomically(path, lambda file: file.write(payload))


def open_calibrated(path: Path) -> SavedCalibration:
    """Open a file of statistics.

    Raises:
        CalibrationError: If it is missing, damaged or something else.
    """
    if not path.is_file():  # a pipe would be waited for
        raise _damaged(path)
    try:
        file: Any = safe_open(path, "pt")
        info = CalibrationInfo.model_validate_json((file.metadata() or {}).get(_METADATA, ""))
        keys = list(file.keys())
    except (OSError, SafetensorError, ValidationError) as error:
        raise _damaged(path) from error

    def own(part: str) -> dict[str, dict[str, str]]:
        """Return entry -> field -> key of one part."""
        entries: dict[str, dict[str, str]] = {}
        for key in keys:
            if key.startswith(f"{part}/"):
                entry, _, name = key.removeprefix(f"{part}/").rpartition("/")
                entries.setdefault(entry, {})[name] = key
        return entries

    def group_stats(part: dict[str, dict[str, str]], name: str) -> GroupStats:
        fields = {f"{name}/{field}": file.get_tensor(key).clone() for field, key in part[name].items()}
        try:
            return unpack_stats(Entry(fields, {}))[name]
        except (KeyError, TypeError) as error:  # fields are missing, or others are there
            raise _damaged(path) from error

    def head_stats(part: dict[str, dict[str, str]], name: str) -> HeadStats:
        fields = {f"{name}/{field}": file.get_tensor(key).clone() for field, key in part[name].items()}
        try:
            return unpack_head_stats(fields)[name]
        except KeyError as error:  # fields are missing
            raise _damaged(path) from error

    plain, smoothed, heads = own("stats"), own("smoothed"), own("heads")
    scales = own("scales").get("", {})
    try:
        channels = {name: file.get_slice(fields["lo"]).get_shape()[1] for name, fields in plain.items()}
    except (KeyError, IndexError) as error:
        raise _damaged(path) from error
    return SavedCalibration(
        path=path,
        info=info,
        channels=channels,
        found=Calibrated(
            stats=_Lazy(list(plain), partial(group_stats, plain)),
            smoothed_stats=_Lazy(list(smoothed), partial(group_stats, smoothed)) if smoothed else None,
            scales=_Lazy(list(scales), lambda name: file.get_tensor(scales[name]).clone()) if scales else None,
            attention_stats=_Lazy(list(heads), partial(head_stats, heads)) if heads else None,
        ),
    )


def _damaged(path: Path) -> CalibrationError:
    return CalibrationError(
        f"statistics must be a file that hyq-search calibrate wrote, but {path} is none or damaged; write it again"
    )


def require_usable(saved: SavedCalibration, plan: QuantPlan) -> None:
    """Check that statistics serve a plan: plain ones any, all that depends on a configuration only that one.

    Raises:
        CalibrationError: If they were gathered for another configuration, number of steps, or size of model.
    """
    info = saved.info
    if info.num_steps != plan.num_steps:
        raise CalibrationError(
            f"statistics must be of as many steps as the plan, {plan.num_steps}, but {saved.path} is of "
            f"{info.num_steps}; calibrate with that number"
        )
    is_bound = (
        needs_search(plan) or needs_smoothed_stats(plan) or needs_attention_stats(plan) or needs_sequential_stats(plan)
    )
    if info.config != plan.config and (is_bound or info.config.calibration == "sequential"):
        raise CalibrationError(
            "searched or sequential calibration, and that of attention or smoothed inputs, serves the configuration it "
            f"was made for, but {saved.path} was made for another one; calibrate with this configuration"
        )
    for layer in plan.quantized:
        channels = saved.channels.get(layer.name, layer.in_features)
        if channels != layer.in_features:
            raise CalibrationError(
                f"statistics of {layer.name} must be of its {layer.in_features} input channels, but {saved.path} has "
                f"{channels}; calibrate this model"
            )
