"""What a study's storage asks its database, counted where SQLAlchemy sends it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
import sqlalchemy


@contextmanager
def statements(study: optuna.Study) -> Iterator[list[tuple[str, Any]]]:
    """Collect the SQL statements and their parameters that a block sends for a study."""
    engine = study._storage._backend._backend.engine  # patient, cached, tables
    sent: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, is_many: bool) -> None:
        sent.append((statement, parameters))

    sqlalchemy.event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        sqlalchemy.event.remove(engine, "before_cursor_execute", note)


def texts(sent: list[tuple[str, Any]]) -> list[str]:
    """Return the statements alone, sorted, with as many parameters as they may have."""
    return sorted(text.replace(", ?", "") for text, _ in sent)
