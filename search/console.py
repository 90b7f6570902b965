"""What commands print: answers as tables or JSON on stdout; progress and remarks on stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

INTERRUPTED = 130
"""Exit code of a command that a signal has ended before its work was done: started again, it goes on."""


def print_json(value: Any) -> None:
    """Print an answer as JSON, which programs read."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_line(text: str) -> None:
    """Print one line of an answer as it is."""
    sys.stdout.write(text + "\n")


def remark(text: str) -> None:
    """Print one line that is not part of the answer."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows under their column names: a drawn table on a terminal, aligned columns elsewhere; empty columns go."""
    columns = [
        name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)
    ]
    lines = [[row.get(name, "") for name in columns] for row in rows]
    if not sys.stdout.isatty():
        widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
        for line in [columns, *lines]:
            print_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(*columns, header_style="bold")
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def one_line(text: str) -> str:
    """Return a message as one line; the items of a list are separated by semicolons."""
    first, *rest = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " ".join([first, "; ".join(line.removeprefix("- ") for line in rest)]).strip()
