"""Choosing layers by glob patterns over canonical names.

Patterns are `fnmatch` globs, case sensitive; `*` also crosses dots. A pattern that matches nothing is an error, because
the layers it was meant for would silently stay as they are.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from hyquant.config import LayerSelection
from hyquant.errors import LayerMatchError

_WORD = re.compile(r"\w+")


def select_layers(names: Sequence[str], selection: LayerSelection, *, model: str) -> tuple[str, ...]:
    """Return the names that are included and not excluded, in their given order.

    Args:
        names: All canonical layer names of a model.
        selection: Include and exclude patterns; exclude wins.
        model: Name of the model, for messages.

    Raises:
        LayerMatchError: If patterns match nothing; the message names each with its closest match.
    """
    require_matches(names, {"include": selection.include, "exclude": selection.exclude}, model=model)
    return tuple(name for name in names if takes_part(name, selection))


def takes_part(name: str, selection: LayerSelection) -> bool:
    """Say whether a layer is included and not excluded."""
    return first_match(name, selection.include) is not None and first_match(name, selection.exclude) is None


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that matches a name, or None."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def require_matches(names: Sequence[str], patterns: dict[str, tuple[str, ...]], *, model: str) -> None:
    """Raise unless every pattern matches a name.

    Args:
        names: All canonical layer names of a model.
        patterns: Patterns by what they are for ("include", "exclude", "smoothing").
        model: Name of the model, for the message.

    Raises:
        LayerMatchError: Naming every pattern without a match at once.
    """
    problems = [
        f"{purpose} pattern '{pattern}' matched no layer of {model}; {_hint(pattern, names)}"
        for purpose, globs in patterns.items()
        for pattern in globs
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if problems:
        raise LayerMatchError(" ".join(problems))


def _hint(pattern: str, names: Sequence[str]) -> str:
    """Suggest the pattern with each unknown word replaced by the closest word that occurs in layer names."""
    words = sorted({word for name in names for word in _WORD.findall(name)})

    def closest(match: re.Match[str]) -> str:
        word = match.group()
        return word if word in words else next(iter(get_close_matches(word, words, n=1)), word)

    suggestion = _WORD.sub(closest, pattern)
    if any(fnmatchcase(name, suggestion) for name in names):
        return f"did you mean '{suggestion}'?"
    example = names[0] if names else "none"
    return f"patterns are globs over layer names such as '{example}'."
