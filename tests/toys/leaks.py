"""Where a text can be found on this machine: in files, in rows of a database, in command lines of processes."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import sqlalchemy

_INTERVAL_S = 0.1


def spellings(secrets: Mapping[str, str]) -> dict[bytes, str]:
    """Return what each secret is, by how it may be spelled: as it is, and as addresses have it."""
    return {spelled.encode(): what for what, text in secrets.items() for spelled in (text, quote(text, safe=""))}


def in_text(content: bytes, secrets: Mapping[str, str]) -> set[str]:
    """Return which secrets stand in a text."""
    return {what for spelled, what in spellings(secrets).items() if spelled in content}


def in_files(folder: Path, secrets: Mapping[str, str]) -> list[str]:
    """Return "FILE: SECRET" for every secret in a file below a folder, in its content or its name."""
    found = []
    for path in sorted(folder.rglob("*")):
        content = path.name.encode() + (path.read_bytes() if path.is_file() else b"")
        found += [f"{path.relative_to(folder)}: {what}" for what in sorted(in_text(content, secrets))]
    return found


def in_rows(url: str, secrets: Mapping[str, str]) -> list[str]:
    """Return "TABLE: SECRET" for every secret in a row of a database."""
    engine = sqlalchemy.create_engine(url)
    tables = sqlalchemy.MetaData()
    tables.reflect(engine)
    found = set()
    with engine.connect() as connection:
        for table in tables.sorted_tables:
            for row in connection.execute(sqlalchemy.select(table)):
                texts = (value if isinstance(value, bytes) else str(value).encode() for value in row)
                found |= {f"{table.name}: {what}" for text in texts for what in in_text(text, secrets)}
    engine.dispose()
    return sorted(found)


@dataclass
class Sightings:
    """What `watched_command_lines` saw.

    Attributes:
        command_lines: What was looked at, by process id, newest last.
        leaks: "COMMAND LINE: SECRET" of processes that nobody gave the secret to.
        late_leaks: The same of processes that were given it, while a slot's worker ran.
    """

    command_lines: dict[int, list[str]] = field(default_factory=dict)
    leaks: set[str] = field(default_factory=set)
    late_leaks: set[str] = field(default_factory=set)


@contextmanager
def watched_command_lines(secrets: Mapping[str, str], *, given: str, at_work: str) -> Iterator[Sightings]:
    """Look at the command lines of all processes every 100 ms.

    Args:
        secrets: What to look for.
        given: Stands in command lines that were given secrets; such a process needs a moment to hide them.
        at_work: Stands in the command line of a slot; while there is one, the moment is over.
    """
    seen, is_over = Sightings(), threading.Event()

    def look() -> None:
        lines = dict(_command_lines())
        is_at_work = any(at_work.encode() in line for line in lines.values())
        for pid, line in lines.items():
            text = line.replace(b"\0", b" ").decode(errors="replace")
            known = seen.command_lines.setdefault(pid, [])
            if text not in known:
                known.append(text)
            leaks = {f"{text}: {what}" for what in in_text(line, secrets)}
            if given not in text:
                seen.leaks |= leaks
            elif is_at_work:
                seen.late_leaks |= leaks

    def watch() -> None:
        while not is_over.wait(_INTERVAL_S):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def _command_lines() -> Iterator[tuple[int, bytes]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield int(path.parent.name), path.read_bytes()
        except OSError:  # it has ended
            continue
