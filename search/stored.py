"""Values as a database has them, read back as what they were, or refused in a sentence."""

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from search.errors import StoreError

Value = TypeVar("Value")


def read_stored(read: Callable[[Any], Value], stored: object, where: str) -> Value:
    """Return a stored value; `read` validates it.

    Raises:
        StoreError: If it is something else: another version's, or changed by somebody.
    """
    try:
        return read(stored)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise StoreError(
            f"{where} must be what this version of hyq-search stores, but {place} is wrong ({first['msg']}); use the "
            "version that wrote it, or another study"
        ) from error
