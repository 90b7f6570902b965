"""Arguments of a module's call as plain values: tensors and scalars in nested tuples, lists and dictionaries."""

from collections.abc import Callable
from typing import Any, TypeAlias, Union

from torch import Tensor

from hyquant.errors import CalibrationError

CallValue: TypeAlias = Union[
    Tensor, bool, int, float, str, "tuple[CallValue, ...]", "list[CallValue]", "dict[str, CallValue]", None
]
"""What a recorded argument may be: whatever can be stored as tensors and JSON and handed in again."""


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a nested value with every tensor changed; containers are new, everything else is the same object."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        changed = [map_tensors(entry, change) for entry in value]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    if isinstance(value, list):
        return [map_tensors(entry, change) for entry in value]
    if isinstance(value, dict):
        return {key: map_tensors(entry, change) for key, entry in value.items()}
    return value


def require_plain(value: object, where: str) -> None:
    """Check that an argument can be recorded.

    Args:
        value: The argument.
        where: What to call it in the message.

    Raises:
        CalibrationError: If it is, or holds, anything but a `CallValue`.
    """
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        for index, entry in enumerate(value):
            require_plain(entry, f"{where}[{index}]")
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, entry in value.items():
            require_plain(entry, f"{where}[{key!r}]")
    elif value is not None and not isinstance(value, Tensor | bool | int | float | str):
        raise CalibrationError(
            "a recorded argument must be made of tensors, numbers, text, None, tuples, lists and dicts with text keys, "
            f"but {where} is a {type(value).__name__}; record a module that gets plain values."
        )
