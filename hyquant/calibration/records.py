"""The records of one prompt as a folder: written while the model runs, read back one at a time.

    FOLDER/records.json            what every record holds and which tensor stands where, with a SHA-256 over it
    FOLDER/SHA256.safetensors      one tensor per file, under the digest of the file

A tensor that was stored before is not stored again. So what all steps share (text, mask, guidance, rotary tables) is
there once, and a step adds its latents and its timestep. Neither writing nor reading holds more than one record, files
are memory-mapped, and nothing is ever unpickled.
"""

import glob
import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, overload

from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hyquant.config import digest
from hyquant.errors import CalibrationError
from hyquant.file_modes import FILE_MODE, make_folder
from hyquant.holding import held, is_held
from hyquant.json_text import parse_json
from hyquant.models.base import Record, RecordSink

logger = logging.getLogger(__name__)

INDEX = "records.json"
_TENSOR = "tensor"
_PARTIAL = ".partial"


class StoredRecords(Sequence[Record]):
    """Records of several prompts on disk; each is read when it is asked for, and prompts are counted from 0.

    It may be iterated any number of times. Tensors are mapped into memory from their files; `folders` must stay while
    they are in use.

    Raises:
        CalibrationError: If a folder is missing or damaged; `write_records` makes it anew.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._places: list[tuple[int, Path, JsonValue]] = []
        for prompt_index, folder in enumerate(folders):
            packed = _read_index(folder)
            if packed is None:
                raise CalibrationError(f"records must be whole, but those in {folder} are not; capture them again.")
            self._places.extend((prompt_index, folder, record) for record in packed)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        prompt_index, folder, packed = self._places[index]
        return replace(Record(**unpack_tree(packed, lambda name: _load(folder, name))), prompt_index=prompt_index)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def are_intact(folder: Path) -> bool:
    """Tell whether a folder holds whole records; reads every file to know.

    A file that is cut short, changed or missing makes the folder count as not written.
    """
    packed = _read_index(folder)
    if packed is None:
        return False
    names: set[str] = set()
    for record in packed:
        unpack_tree(record, names.add)
    damaged = [name for name in names if _file_digest(folder / f"{name}.safetensors") != name]
    if damaged:
        logger.warning("records in %s are damaged (files=%d) and are captured again", folder, len(damaged))
    return not damaged


def write_records(folder: Path, capture: Callable[[RecordSink], None]) -> None:
    """Make a folder of the records that `capture` hands to the sink it is given; replaces a damaged folder.

    The files are written beside the folder and renamed when the last record is there: an interrupted capture leaves no
    records. What a killed one left is removed by the next one of the same folder. Whatever a crash of the machine
    leaves undone, the digests show.
    """
    make_folder(folder.parent)
    _clear_leftovers(folder)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=_PARTIAL) as temporary,
        held(Path(temporary)),
    ):
        new = Path(temporary) / "new"
        make_folder(new)
        writer = _Writer(new)
        capture(writer.add)
        writer.finish()
        _put_in_place(new, folder, aside=Path(temporary) / "old")


def pack_tree(tree: object, put: Callable[[Tensor], str]) -> JsonValue:
    """Return JSON for a tree of mappings, lists, tuples, numbers, text and tensors, which `put` gives names.

    Raises:
        CalibrationError: If the tree holds anything else.
    """
    if isinstance(tree, Tensor):
        return {"tensor": put(tree)}
    if isinstance(tree, Mapping):
        return {"mapping": {str(key): pack_tree(value, put) for key, value in tree.items()}}
    if isinstance(tree, list | tuple):
        return {"tuple" if isinstance(tree, tuple) else "list": [pack_tree(value, put) for value in tree]}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": str(tree)}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise CalibrationError(
        f"a record must hold tensors, numbers, text and containers of them, but got {type(tree).__name__}; "
        "leave it out when capturing."
    )


def unpack_tree(packed: JsonValue, get: Callable[[str], Any]) -> Any:
    """Undo `pack_tree`; `get` returns what stands for the tensor of a name."""
    match packed:
        case {"tensor": str(name)}:
            return get(name)
        case {"float": str(number)}:
            return float(number)
        case {"mapping": dict(entries)}:
            return {key: unpack_tree(value, get) for key, value in entries.items()}
        case {"list": list(entries)}:
            return [unpack_tree(value, get) for value in entries]
        case {"tuple": list(entries)}:
            return tuple(unpack_tree(value, get) for value in entries)
        case _:
            return packed


class _Writer:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: set[str] = set()
        self._records: list[JsonValue] = []

    def add(self, record: Record) -> None:
        held = {field.name: getattr(record, field.name) for field in fields(record)}
        self._records.append(pack_tree(held, self._put))

    def finish(self) -> None:
        envelope = {"sha256": digest(self._records, length=64), "records": self._records}
        _write(self._folder / INDEX, json.dumps(envelope, allow_nan=False).encode())

    def _put(self, tensor: Tensor) -> str:
        payload = save({_TENSOR: tensor.detach().cpu().contiguous()})
        name = hashlib.sha256(payload).hexdigest()
        if name not in self._names:
            _write(self._folder / f"{name}.safetensors", payload)
            self._names.add(name)
        return name


def _read_index(folder: Path) -> list[JsonValue] | None:
    """Return the packed records of a folder, or None if there are none or they do not match their digest."""
    try:
        envelope = parse_json((folder / INDEX).read_bytes())
        records = envelope["records"]
        if digest(records, length=64) == envelope["sha256"] and isinstance(records, list):
            return records
        logger.warning("records in %s do not match their sha256 and are captured again", folder)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("records in %s have a damaged index (%s) and are captured again", folder, error)
    return None


def _load(folder: Path, name: str) -> Tensor:
    path = folder / f"{name}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(_TENSOR)
    except FileNotFoundError as error:
        raise CalibrationError(
            f"records must stay while they are read, but {path} is gone; capture them again"
        ) from error
    except SafetensorError as error:
        raise CalibrationError(
            f"a record's tensor must be safetensors, but {path} is not ({error}); remove {folder} and capture again"
        ) from error
    assert isinstance(tensor, Tensor)
    return tensor


def _file_digest(path: Path) -> str | None:
    state = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                state.update(chunk)
    except FileNotFoundError:
        return None
    return state.hexdigest()


def _write(path: Path, payload: bytes) -> None:
    path.write_bytes(payload)
    path.chmod(FILE_MODE)


def _clear_leftovers(folder: Path) -> None:
    for partial in folder.parent.glob(f".{glob.escape(folder.name)}.*{_PARTIAL}"):
        if not is_held(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(new: Path, folder: Path, *, aside: Path) -> None:
    """Rename a finished folder; one that another process finished first is kept, because others may be reading it."""
    try:
        new.rename(folder)
    except OSError:
        if are_intact(folder):
            return
        folder.rename(aside)
        new.rename(folder)
