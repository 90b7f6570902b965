"""A content-addressed store of tensors: safetensors beside JSON, written whole or not at all.

An entry is `KEY.safetensors` and `KEY.json`. The JSON is written last and holds a SHA-256 over both, so an
entry exists only if they are complete and agree; whatever else lies there (a file cut short, a changed byte, a leftover
of a killed process) counts as missing, and the caller builds it again. Several processes may write one key: each
writes files of its own and renames them. Nothing is ever unpickled. Whoever takes an entry sets the time of its JSON
file, because the time of the last reading is one that file systems keep for a day or not at all.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hyquant.config import digest
from hyquant.errors import ConfigError
from hyquant.file_modes import FILE_MODE, make_folder
from hyquant.json_text import parse_json

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Entry(NamedTuple):
    """What an entry holds: named tensors on the CPU and JSON."""

    tensors: dict[str, Tensor]
    meta: dict[str, JsonValue]


class Store:
    """Entries below one folder, by key; keys are digests of whatever determines the content.

    Args:
        root: Folder of the store; made with the first entry.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def has(self, key: str) -> bool:
        """Tell whether an intact entry is there; reads it whole to know, and does not count as its use."""
        return self._read(key) is not None

    def holds(self, key: str) -> bool:
        """Tell whether an entry lies there, intact or not; reads nothing."""
        return self._paths(key)[1].is_file()

    def get(self, key: str) -> Entry | None:
        """Return an entry, or None if it is missing, incomplete or damaged."""
        found = self._read(key)
        if found is not None:
            mark_used(self._paths(key)[1])
        return found

    def put(self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, JsonValue]) -> None:
        """Write an entry, replacing what is there.

        Raises:
            OSError: If the folder cannot be written; nothing half-written remains under the key.
        """
        tensors_path, meta_path = self._paths(key)
        make_folder(self.root)
        payload = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        envelope = {"sha256": _digest(payload, dict(meta)), "meta": dict(meta)}
        write_atomically(tensors_path, payload)
        write_atomically(meta_path, json.dumps(envelope, sort_keys=True, allow_nan=False).encode())

    def get_or_build(self, key: str, build: Callable[[], Entry]) -> Entry:
        """Return an entry, building it, and storing it if there is room, if it is missing or damaged."""
        found = self.get(key)
        if found is not None:
            return found
        built = build()
        self.keep(key, built.tensors, built.meta)
        return built

    def keep(self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, JsonValue]) -> None:
        """Write an entry if the disk takes it; else warn, and whoever needs it later builds it again."""
        try:
            self.put(key, tensors, meta)
        except OSError as error:
            logger.warning("store entry key=%s needs room in %s, but: %s; free some", key, self.root, error)

    def folder(self, key: str) -> Path:
        """Return where an entry of many files lies, whether it is there or not (`hyquant.calibration.records`).

        Raises:
            ConfigError: If the key is no plain name.
        """
        if not _KEY.fullmatch(key):
            raise ConfigError(f"a store key must be letters, digits, '.', '_' and '-', but got {key!r}; use a digest")
        return self.root / key

    def fetch_folder(self, key: str, is_intact: Callable[[Path], bool]) -> None:
        """Look elsewhere for an entry of many files that is missing here; a store of one level has nowhere to look."""

    def give_folder(self, key: str, is_intact: Callable[[Path], bool]) -> None:
        """Share an entry of many files; a store of one level shares with nobody."""

    def _read(self, key: str) -> Entry | None:
        tensors_path, meta_path = self._paths(key)
        try:
            envelope = parse_json(meta_path.read_bytes())
            payload = tensors_path.read_bytes()
            if _digest(payload, envelope["meta"]) != envelope["sha256"]:
                logger.warning("store entry key=%s does not match its sha256 and is built again", key)
                return None
            return Entry(load(payload), envelope["meta"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("store entry key=%s is damaged (%s) and is built again", key, error)
            return None

    def _paths(self, key: str) -> tuple[Path, Path]:
        stem = self.folder(key).name
        return self.root / f"{stem}.safetensors", self.root / f"{stem}.json"


def mark_used(path: Path) -> None:
    """Let the time of a file say that it is used now; one that is gone, or somebody else's, keeps its time."""
    with suppress(OSError):
        os.utime(path)


def _digest(payload: bytes, meta: JsonValue) -> str:
    return hashlib.sha256(payload + digest(meta, length=64).encode()).hexdigest()


def write_atomically(path: Path, payload: bytes) -> None:
    """Write a file with mode 0640 so that others see either its old or its new content."""
    fill_atomically(path, lambda file: file.write(payload))


def fill_atomically(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let `fill` write a file with mode 0640, of which others see either the old or the new content.

    The bytes go to a new file in the same folder, reach the disk, and the file is renamed.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, FILE_MODE)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
