"""Calibration records of a run on disk: each rank's share of the denoiser's calls, used again by runs that fit.

    FOLDER/calib_data_RANK/         records, as `hyquant.calibration.records` writes them; without _RANK for one rank
    FOLDER/calib_data_RANK.json     what they were captured from

The note is removed before records are written and written after them, so records are never taken for others'. Nothing
in it depends on a quantization: every --quant_type can use the records of any other.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import JsonValue

from hyquant.calibration.records import INDEX, StoredRecords, are_intact, write_records
from hyquant.calibration.store import write_atomically
from hyquant.distributed import Group
from hyquant.errors import CalibrationError, HyquantError
from hyquant.file_modes import make_folder
from hyquant.models.base import Record, RecordSink
from hyquant.session.ranks import get_rank_suffix_file

Settings = Mapping[str, JsonValue]


class Dump:
    """The records of one rank.

    Args:
        folder: Where those of all ranks lie.
        rank: Whose.
        num_ranks: Of how many.

    Attributes:
        note: The file that says what was captured.
        records: The folder of the records.
    """

    def __init__(self, folder: Path, *, rank: int, num_ranks: int) -> None:
        self.note = folder / get_rank_suffix_file("calib_data", "json", num_ranks > 1, rank)
        self.records = self.note.with_suffix("")

    def problem(self, settings: Settings) -> str | None:
        """Return why the records cannot be used, None if they can; reads all of them to know."""
        try:
            found = json.loads(self.note.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return "absent"
        except (OSError, ValueError):
            return "unreadable"
        if not isinstance(found, dict) or found != dict(settings):
            known = found if isinstance(found, dict) else {}
            changed = [name for name, value in settings.items() if known.get(name) != value]
            return f"stale, other {', '.join(changed)}" if changed else "stale"
        return None if are_intact(self.records) else "damaged"

    def prepare(self) -> None:
        """Make room for records: what was captured before is removed.

        Raises:
            CalibrationError: If the folder cannot be written, or what lies there is not records.
        """
        folder = self.note.parent
        try:
            make_folder(folder)
            self.note.unlink(missing_ok=True)
            is_foreign = self.records.exists() and not (self.records / INDEX).is_file() and any(self.records.iterdir())
        except OSError as error:
            raise _unwritable(folder, error) from error
        if not os.access(folder, os.W_OK):
            raise _unwritable(folder, "no right to write")
        if is_foreign:
            raise CalibrationError(
                f"only calibration records may be replaced, but {self.records} holds other things; move it away or "
                "give another --quant_dump_calib_folder"
            )
        try:
            if self.records.exists():  # whole records of another run would be kept by `write_records`
                shutil.rmtree(self.records)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def write(self, settings: Settings, capture: Callable[[RecordSink], None]) -> None:
        """Write the records that `capture` hands over, and the note.

        Raises:
            CalibrationError: If they cannot be written; after `capture` has run to its end, so that ranks which
                capture together stay together.
        """
        try:
            write_records(self.records, lambda sink: _captured(capture, sink))
            write_atomically(self.note, json.dumps(dict(settings), indent=2, ensure_ascii=False).encode())
        except OSError as error:
            raise _unwritable(self.note.parent, error) from error

    def read(self) -> StoredRecords:
        """Return the records.

        Raises:
            CalibrationError: If they are not there.
        """
        return StoredRecords([self.records])


def share_of(sink: RecordSink, group: Group) -> RecordSink:
    """Return a sink that passes every n-th record on, for n ranks which are all handed the same ones."""
    num_seen = 0

    def take(record: Record) -> None:
        nonlocal num_seen
        if num_seen % group.world_size == group.rank:
            sink(record)
        num_seen += 1

    return take


def _captured(capture: Callable[[RecordSink], None], sink: RecordSink) -> None:
    """Capture to the end even if a record cannot be taken, and raise then."""
    failures: list[OSError | HyquantError] = []

    def take(record: Record) -> None:
        if failures:
            return
        try:
            sink(record)
        except (OSError, HyquantError) as error:
            failures.append(error)

    capture(take)
    if failures:
        raise failures[0]


def _unwritable(folder: Path, reason: object) -> CalibrationError:
    return CalibrationError(
        f"calibration records must be written, but {folder} does not take them: {reason}; make room or give another "
        "--quant_dump_calib_folder"
    )
