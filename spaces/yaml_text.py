"""YAML as users write it: plain values, small, of few levels, whatever the text pretends to be.

PyYAML's safe loader runs no code, but it fails in ways of its own on some scalars (`2024-99-99`, `!!float x`), on
lists inside lists inside lists, and it lets a short text stand for a huge document by naming parts again and again.
"""

from typing import Any

import yaml

MOST_VALUES = 100_000
MOST_LEVELS = 40


def parse_yaml(text: str) -> Any:
    """Return the document in a text.

    Raises:
        yaml.YAMLError: If it is no YAML, or is too large or too deep to be meant; the message says which.
    """
    try:
        document = yaml.safe_load(text)
    except RecursionError as error:
        raise yaml.YAMLError(f"it must have at most {MOST_LEVELS} levels, but has too many to read") from error
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise yaml.YAMLError(f"it holds a value that is not what its form says: {error}; put it in quotes") from error
    _require_small(document)
    return document


def _require_small(document: Any) -> None:
    """Count values where they stand, a part as often as it is named."""
    waiting, seen = [(document, 1)], 0
    while waiting:
        value, level = waiting.pop()
        seen += 1
        if level > MOST_LEVELS or seen > MOST_VALUES:
            raise yaml.YAMLError(
                f"it must have at most {MOST_VALUES} values and {MOST_LEVELS} levels, but has more; shorten it"
            )
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | set) else ()
        waiting.extend((part, level + 1) for part in inner)
