"""Tensors that stay in their files until some of their rows are read: safetensors by offset, `.pt` mapped.

Reading safetensors by offset, not through a map, keeps a process as small as what it reads at a time.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hyquant.errors import ConfigError
from hyquant.export.tensor_file import DTYPE_NAMES, size_of
from hyquant.json_text import parse_json
from hyquant.models.checkpoints import is_archive, read_checkpoint

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class StoredTensor(Protocol):
    """A tensor in a file."""

    @property
    def dtype(self) -> torch.dtype:
        """Return its dtype."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Read rows `start` to `stop` of dimension 0 into memory of their own."""
        ...


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor of a safetensors file, which begins at byte `offset` of the file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        """Read rows `start` to `stop` of dimension 0.

        Raises:
            ConfigError: If they cannot be read.
        """
        row_bytes = size_of((self.dtype, self.shape[1:]))
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        view, position = memoryview(buffer.numpy().data), self.offset + start * row_bytes
        try:
            with self.path.open("rb", buffering=0) as file:
                while view.nbytes:
                    count = os.preadv(file.fileno(), [view], position)
                    if count == 0:
                        raise EOFError("it became shorter")
                    view, position = view[count:], position + count
        except (OSError, EOFError) as error:
            raise ConfigError(f"{self.path} must stay readable while it is read, but: {error}; start again") from error
        return buffer.view(self.dtype).reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class MappedTensor:
    """A tensor that torch has mapped to its file."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Return its dtype."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        return tuple(self.tensor.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Read rows `start` to `stop` of dimension 0."""
        return self.tensor[start:stop].clone(memory_format=torch.contiguous_format)


def open_file(path: Path) -> Mapping[str, StoredTensor]:
    """Return the tensors of a `.safetensors` or `.pt` file by name; their values are not read.

    Raises:
        ConfigError: If it is missing, cut short, damaged, or a `.pt` file of the old kind that cannot be mapped.
    """
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.is_file() and not is_archive(path):
        raise ConfigError(
            f"a .pt file must be an archive as torch has written since 1.6, but {path} is damaged or older and cannot "
            "be read in pieces; download it again, or give it as safetensors"
        )
    return {name: MappedTensor(tensor.detach()) for name, tensor in read_checkpoint(path).items()}


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            header: dict[str, Any] = parse_json(file.read(length)) if 8 + length <= size else {}
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = {name: _entry(path, 8 + length, name, entry) for name, entry in entries.items()}
        expected = 8 + length + _end_of(sorted(entry["data_offsets"] for entry in entries.values()))
    except FileNotFoundError as error:
        raise ConfigError(f"a file of weights must exist, but {path} does not; complete the download") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ConfigError(f"{path} must be a safetensors file, but it is not: {error}; download it again") from error
    if expected != size:
        raise ConfigError(f"{path} must have {expected} bytes by its header, but it has {size}; download it again")
    return found


def _end_of(places: Sequence[Sequence[int]]) -> int:
    """Return where the last of the sorted places ends; each must begin where the one before it ends."""
    end = 0
    for first, last in places:
        if first != end:
            raise ValueError(f"its tensors must lie one behind the other, but one begins at {first} instead of {end}")
        end = last
    return end


def _entry(path: Path, start: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ConfigError(
            f"weights to be quantized must be float32, bfloat16 or float16, but {name} of {path} is {entry['dtype']}; "
            "give the float checkpoint"
        )
    dtype, shape = _DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
    first, last = entry["data_offsets"]
    if min(first, *shape, 0) < 0 or last - first != size_of((dtype, shape)):
        raise ValueError(f"{name} takes {last - first} bytes, which is not its shape")
    return SafetensorsTensor(path, start + int(first), dtype, shape)
