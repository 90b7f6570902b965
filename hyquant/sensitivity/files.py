"""A map on disk, and the journal of its probes: one JSON line each, on the disk before the next probe begins.

    SUBJECT.jsonl   measurements so far, SUBJECT being the digest of the map's subject
    SUBJECT.json    the finished map, written whole or not at all

A process that is killed leaves at most one line cut short, which is taken out when the journal is opened again.
"""

import os
from pathlib import Path

from pydantic import ValidationError

from hyquant.calibration.store import write_atomically
from hyquant.file_modes import FILE_MODE, make_folder
from hyquant.sensitivity.map import Measurement, SensitivityMap


class Journal:
    """Measurements in a file, which is made with the first one.

    Attributes:
        measured: What the file holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.measured = _whole_lines(path)

    def add(self, measurement: Measurement) -> None:
        """Append a measurement; on return it is on the disk."""
        make_folder(self._path.parent)
        with self._path.open("ab") as file:
            file.write(measurement.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._path.chmod(FILE_MODE)
        self.measured.append(measurement)

    def delete(self) -> None:
        """Delete the file; the map holds what it held."""
        self._path.unlink(missing_ok=True)


def save_map(path: Path, found: SensitivityMap) -> None:
    """Write a map with mode 0640; others see its old or its new content."""
    make_folder(path.parent)
    write_atomically(path, found.model_dump_json(indent=1).encode() + b"\n")


def load_map(path: Path) -> SensitivityMap | None:
    """Return the map in a file; None if there is none, or it is no map of this version."""
    try:
        return SensitivityMap.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _whole_lines(path: Path) -> list[Measurement]:
    """Read a journal up to the first line that is no measurement, and cut off what follows."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    found: list[Measurement] = []
    length = 0
    for line in content.splitlines(keepends=True):
        measurement = _measurement(line)
        if measurement is None:
            os.truncate(path, length)
            break
        found.append(measurement)
        length += len(line)
    return found


def _measurement(line: bytes) -> Measurement | None:
    try:
        return Measurement.model_validate_json(line) if line.endswith(b"\n") else None
    except ValidationError:
        return None
