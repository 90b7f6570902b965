"""YAML as users write it: plain values, small, of few levels, whatever the text pretends to be.

PyYAML's safe loader runs no code, but it fails in ways of its own on some scalars (`2024-99-99`, `!!float x`), on
lists inside lists inside lists, and it lets a short text stand for a huge document by naming parts again and again.
"""

from typing import Any

import yaml

MOST_VALUES = 100_000
MOST_LEVELS = 40


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which for a field that is given twice would take the last value without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping, and refuse it if a key stands there twice."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"{key.value!r} is given twice in one mapping"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str) -> Any:
    """Return the document in a text.

    Raises:
        yaml.YAMLError: If it is no YAML, gives a field twice, or is too large or too deep to be meant; the message says
            which.
    """
    try:
        loader = _Loader(text)
        try:
            document = loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError as error:
        raise yaml.YAMLError(f"it must have at most {MOST_LEVELS} levels, but has too many to read") from error
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        where = "" if place is None else f"line {place.line + 1}, column {place.column + 1}: "
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise yaml.YAMLError(f"{where}{said}; correct that line") from error
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise yaml.YAMLError(f"it holds a value that is not what its form says: {error}; put it in quotes") from error
    _require_small(document)
    return document


def what_it_holds(content: object) -> str:
    """Return what stands where a mapping should, for a sentence."""
    return "is empty" if content is None else f"got {type(content).__name__}"


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
