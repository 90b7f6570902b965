"""Writing a folder whole or not at all, over several attempts: what a killed writer left is gone on with.

Beside `NAME` lies `.NAME.hyq-resume/` while it is being written:

    export/         the folder that becomes NAME
    journal.jsonl   first line: what is being written, as a digest; then one line for each thing that is done

The journal goes before `export/` gets its name, for from then on `export/` may be what had the name before.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import JsonValue

from hyquant.errors import ExportError
from hyquant.export.folder import (
    as_export_error,
    check_space,
    check_target,
    clear_leftovers,
    fsync,
    settle,
    swap_in,
)
from hyquant.file_modes import make_folder
from hyquant.holding import held, is_held
from hyquant.json_text import parse_json

logger = logging.getLogger(__name__)

Entry = Mapping[str, JsonValue]


class Attempt:
    """A folder that is being filled, and what earlier attempts have done.

    Attributes:
        folder: What to fill.
        entries: What earlier attempts noted, oldest first; empty on the first attempt.
        discarded: Whether there was an attempt at something else, which was thrown away.
    """

    def __init__(self, place: Path, identity: str) -> None:
        self.folder = place / "export"
        self._journal = place / "journal.jsonl"
        self.entries, found = _read(self._journal)
        self.discarded = found is not None and found != identity
        if found != identity or not self.folder.is_dir():
            self.entries = ()
            shutil.rmtree(self.folder, ignore_errors=True)
            make_folder(self.folder)
            self._journal.write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")

    def keep(self, count: int) -> None:
        """Forget all but the first entries."""
        self.entries = self.entries[:count]
        lines = [self._journal.read_text(encoding="utf-8").splitlines()[0], *map(json.dumps, self.entries)]
        temporary = self._journal.with_suffix(".new")
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        temporary.replace(self._journal)

    def note(self, entry: Entry) -> None:
        """Add an entry."""
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def end(self) -> None:
        """Forget the attempt: from now on no other goes on with it."""
        self._journal.unlink()
        fsync(self._journal.parent)


def attempt_place(path: Path) -> Path:
    """Return where a folder is prepared."""
    return path.parent / f".{path.name}.hyq-resume"


@contextmanager
def resumable_folder(
    path: Path, *, identity: str, size_bytes: int, mark: str, overwrite: bool, is_ours: Callable[[Path, str], bool]
) -> Iterator[Attempt]:
    """Give a folder to fill, which becomes `path` if the block ends well; see `hyquant.export.folder.new_folder`.

    After an error nothing is left. After a kill or an interrupt the folder stays, and the next writer of the same
    identity finds it with the entries that were noted.

    Args:
        path: The folder to make; missing parents are made.
        identity: A digest of everything that settles what is written.
        size_bytes: About how much will be written.
        mark: A file name that shows that a folder is one of ours and may be replaced.
        overwrite: Whether an existing folder may be replaced.
        is_ours: Tells of a file name in an existing folder whether we wrote it.

    Raises:
        ExportError: If the folder exists and may not be replaced, is not ours, is being written by another process, or
            the disk cannot take it.
    """
    place = attempt_place(path)
    try:
        clear_leftovers(path)
        check_target(path, mark=mark, overwrite=overwrite, is_ours=is_ours)
        make_folder(path.parent)
        if place.is_dir() and is_held(place):
            raise ExportError(f"an export has one writer, but another process is writing {path}; wait for it")
        check_space(path.parent, size_bytes - _held_bytes(place))
        make_folder(place)
    except OSError as error:
        raise as_export_error(error, path) from error
    is_unfinished = False
    try:
        with held(place):
            attempt = Attempt(place, identity)
            if attempt.discarded:
                logger.warning("what was begun of %s was of other weights or settings and is thrown away", path)
            yield attempt
            settle(attempt.folder)
            check_target(path, mark=mark, overwrite=overwrite, is_ours=is_ours)
            attempt.end()
            swap_in(attempt.folder, path)
    except OSError as error:
        raise as_export_error(error, path) from error
    except (KeyboardInterrupt, SystemExit):
        is_unfinished = True
        raise
    finally:
        if not is_unfinished:
            shutil.rmtree(place, ignore_errors=True)


def _read(journal: Path) -> tuple[tuple[Entry, ...], str | None]:
    """Return the entries of a journal, up to one that was cut short, and its identity; None if there is no journal."""
    try:
        lines = journal.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return (), None
    entries: list[Entry] = []
    for line in lines:
        try:
            entries.append(parse_json(line))
        except ValueError:
            break
    if not entries:
        return (), ""
    return tuple(entries[1:]), str(entries[0].get("identity", ""))


def _held_bytes(place: Path) -> int:
    """Return the bytes on disk below a folder."""
    return sum((Path(folder) / name).stat().st_blocks * 512 for folder, _, names in os.walk(place) for name in names)
