"""Checks that the four packages are ours before anything is imported from them.

`metrics`, `spaces` and `search` are common words and PyPI has packages of the first two names; in the wrong order on
the path they shadow ours without a word. The check reads each package's `__init__.py` as text: importing a stranger
would run it.
"""

import ast
import importlib.util
from pathlib import Path

from search.errors import InstallError

DISTRIBUTION = "hyq-search"
PACKAGES = ("hyquant", "metrics", "spaces", "search")


def check_installation() -> Path:
    """Return the folder that holds our four packages.

    Raises:
        InstallError: If a package is missing, is not ours, or lies in another folder than the rest.
    """
    return check_packages({name: find_package(name) for name in PACKAGES})


def find_package(name: str) -> Path | None:
    """Return the `__init__.py` that `import name` would run, or None; nothing is imported."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def check_packages(inits: dict[str, Path | None]) -> Path:
    """Return the common parent folder of the packages, given the `__init__.py` of each.

    Raises:
        InstallError: See `check_installation`.
    """
    repair = "install hyq-search into an environment of its own (python -m venv .venv; .venv/bin/pip install -e .)"
    for name, init in inits.items():
        if init is None:
            raise InstallError(f"package {name} must be part of hyq-search, but was not found; {repair}.")
        if distribution_of(init) != DISTRIBUTION:
            raise InstallError(
                f"package {name} must come from hyq-search, but {init.parent} is something else; "
                f"uninstall it (pip uninstall {name}) or {repair}."
            )
    parents = {init.resolve().parent.parent for init in inits.values() if init is not None}
    if len(parents) != 1:
        places = ", ".join(sorted(str(parent) for parent in parents))
        raise InstallError(f"hyquant, metrics, spaces and search must share one folder, but lie in {places}; {repair}.")
    return parents.pop()


def distribution_of(init: Path) -> str | None:
    """Return the string assigned to DISTRIBUTION in a package's `__init__.py`, or None."""
    try:
        tree = ast.parse(init.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == "DISTRIBUTION" for target in node.targets)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            return node.value.value
    return None
