"""Look up entries of a literal table that other packages may extend through entry points."""

import difflib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from hyquant.errors import ConfigError

Entry = TypeVar("Entry")


def known_names(table: Mapping[str, object], group: str) -> tuple[str, ...]:
    """Return the table's names, then those that installed packages add under the entry point group."""
    added = sorted(entry.name for entry in entry_points(group=group) if entry.name not in table)
    return (*table, *added)


def find_entry(table: Mapping[str, Entry], group: str, name: str) -> Entry:
    """Return the entry called `name`; the table wins over entry points.

    Args:
        table: Our own entries.
        group: Entry point group, such as "hyq.models"; a match is loaded and returned as it is.
        name: What to look for.

    Raises:
        ConfigError: If nobody offers `name`; the message lists what is known and the closest match.
    """
    if name in table:
        return table[name]
    for entry in entry_points(group=group, name=name):
        loaded: Entry = entry.load()
        return loaded
    known = known_names(table, group)
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise ConfigError(f"{group} knows {', '.join(known)}, but got {name!r}; did you mean {closest[0]!r}?")
