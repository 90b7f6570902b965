"""Structured mutations: a parsed YAML or JSON document with some of its values exchanged, removed or repeated."""

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]

NASTY_TEXT = (
    "", " ", "\u0000", "../x", "../../etc/passwd", "/etc/passwd", "C:\\x", "CON", "a" * 300, "nan", "-1", "1e999",
    "*", "[", "**/*", "\ud7ff\u202e", "{}", "{0.__class__}", "%s", "!!python/name:os.system", "2 x 4", "0-99999",
    "99999999 x 99999999", "sqlite:///x", "mini:nothing", "cpu:0", "auto", "ladder", "x\ny",
)  # fmt: skip
NASTY_NUMBERS = (0, -1, 1, 2, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.0, 1e-320, 1e308, float("inf"), float("nan"))

_SCALARS = (
    st.none() | st.booleans() | st.sampled_from(NASTY_NUMBERS) | st.sampled_from(NASTY_TEXT) | st.integers() | st.text()
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NASTY_TEXT) | st.text(), inner, max_size=4)
    ),
    max_leaves=6,
)


def places(tree: Any, here: Path = ()) -> Iterator[Path]:
    """Yield the path of every value inside a document, and of the document."""
    yield here
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from places(child, (*here, key))


def value_at(tree: Any, path: Path) -> Any:
    """Return the value at a path."""
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def mutated(draw: st.DrawFn, seed: Any) -> Any:
    """Draw a document that differs from `seed` in one to four places."""
    tree = copy.deepcopy(seed)
    for _ in range(draw(st.integers(1, 4))):
        paths = list(places(tree))
        path = paths[draw(st.integers(0, len(paths) - 1))]
        tree = draw(_edited(tree, path, paths))
    return tree


@st.composite
def _edited(draw: st.DrawFn, tree: Any, path: Path, paths: list[Path]) -> Any:
    kind = draw(st.sampled_from(("value", "remove", "rename", "graft")))
    if kind == "graft":  # what another place holds
        new = copy.deepcopy(value_at(tree, paths[draw(st.integers(0, len(paths) - 1))]))
    else:
        new = draw(_VALUES)
    if not path:
        return new
    parent, key = value_at(tree, path[:-1]), path[-1]
    if kind in ("value", "graft"):
        parent[key] = new
    elif kind == "remove":
        del parent[key]
    elif isinstance(parent, dict):
        parent[draw(st.sampled_from(NASTY_TEXT) | st.text(max_size=8))] = parent.pop(key)
    else:
        parent.insert(key, new)
    return tree
