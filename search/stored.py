"""Values as a database has them, read back as what they were, or refused in a sentence."""

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from search.errors import StoreError

Value = TypeVar("Value")


def read_stored(read: Callable[[Any], Value], stored: object, what: str) -> Value:
    """Return a stored value; `read` validates it.

    Raises:
        StoreError: If it is something else: another version's, or changed by somebody.
    """
    try:
        return read(stored)
    except ValidationError as error:
        raise damaged(what, error) from error


def damaged(what: str, error: ValueError) -> StoreError:
    """Return the error about something in a database that is not as this version writes it."""
    said = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
    return StoreError(
        f"{what} must be as this version of hyq-search writes it, but it is not ({said}); use the version that wrote "
        "it, or put a copy of the database back"
    )
