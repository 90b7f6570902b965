"""What all values of the session API have in common: frozen, no unknown fields, and sentences for errors."""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hyquant.config import FrozenModel
from hyquant.errors import ConfigError


class SessionValue(FrozenModel):
    """A frozen value whose constructor raises a `ConfigError` that names every wrong field in a sentence of its own."""

    if not TYPE_CHECKING:  # type checkers keep the constructor that follows from the fields

        def __init__(self, /, **given: Any) -> None:
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise ConfigError(" ".join(_sentence(type(self), each) for each in error.errors())) from error


def hint(unknown: str, known: list[str]) -> str:
    """Return a way out for an unknown name: the closest known one, or all of them."""
    close = get_close_matches(unknown, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known) or 'none'}."


def _sentence(kind: type[FrozenModel], error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"{kind.__name__} must have fields that it knows, but got {place!r}; " + hint(
                place, list(kind.model_fields)
            )
        case "missing":
            return f"{kind.__name__} must be given {place}; add {place}=..."
        case "value_error":
            return str(error["ctx"]["error"])
        case _:
            rule = error["msg"][:1].lower() + error["msg"][1:]
            return f"{kind.__name__} must have a valid {place}, but got {_shown(error['input'])}: {rule}."


def _shown(value: object) -> str:
    is_short = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if is_short else f"a {type(value).__name__}"
