"""Removing what lies in a store: never anything outside of it, never through a symbolic link."""

import shutil
import stat
from pathlib import Path


def is_inside(path: Path, store: Path) -> bool:
    """Say whether a path lies below a store and no part of it on the way there is a symbolic link."""
    root = store.resolve()
    try:
        below = path.absolute().relative_to(store.absolute())
    except ValueError:
        return False
    return below != Path() and ".." not in below.parts and path.resolve() == root / below


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of everything below a folder; links count as links, what vanishes as nothing."""
    total = 0
    for part in (path, *path.rglob("*")):
        try:
            found = part.lstat()
        except FileNotFoundError:
            continue
        total += 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return total


def remove(path: Path, store: Path) -> bool:
    """Remove a file or folder below a store, and say whether it was.

    Raises:
        OSError: If it cannot be removed.
    """
    if not is_inside(path, store):
        return False
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return True
