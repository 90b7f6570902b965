"""Writing a folder whole or not at all."""

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hyquant.errors import ExportError
from hyquant.file_modes import FILE_MODE, FOLDER_MODE, make_folder
from hyquant.holding import held, is_held

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SPARE_BYTES = 16 * 2**20
_PARTIAL = ".hyq-partial"


@contextmanager
def new_folder(
    path: Path, *, size_bytes: int, mark: str, overwrite: bool, is_ours: Callable[[Path, str], bool]
) -> Iterator[Path]:
    """Give a temporary sibling folder to fill, which becomes `path` if the block ends well.

    Files get mode 0640 and the folder 0750, everything is flushed to disk before the folder gets its name, and after an
    error nothing is left. An old folder stays until the new one takes its place, and what a killed writer left behind
    is removed by the next one. Where the file system cannot exchange two names in one step (Linux can), a kill between
    two renames leaves the old folder under a hidden name, and the next writer puts it back.

    Args:
        path: The folder to make; missing parents are made.
        size_bytes: About how much will be written.
        mark: A file name that shows that a folder is one of ours and may be replaced.
        overwrite: Whether an existing folder may be replaced.
        is_ours: Tells of a file name in an existing folder whether we wrote it; a folder with other things is kept.

    Raises:
        ExportError: If the folder exists and may not be replaced, is not ours, or the disk cannot take it.
    """
    temporary: Path | None = None
    try:
        clear_leftovers(path)
        check_target(path, mark=mark, overwrite=overwrite, is_ours=is_ours)
        make_folder(path.parent)
        check_space(path.parent, size_bytes)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PARTIAL))
        with held(temporary):
            yield temporary
            settle(temporary)
            check_target(path, mark=mark, overwrite=overwrite, is_ours=is_ours)  # another writer may have been faster
            swap_in(temporary, path)
    except OSError as error:
        raise as_export_error(error, path) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_target(path: Path, *, mark: str, overwrite: bool, is_ours: Callable[[Path, str], bool]) -> None:
    """Check that a folder may be made or replaced, before anything is computed for it.

    Args:
        path: The folder to make.
        mark: A file name that shows that a folder is one of ours and may be replaced.
        overwrite: Whether an existing folder may be replaced.
        is_ours: Tells of a file name in an existing folder whether we wrote it.

    Raises:
        ExportError: If it exists and may not be replaced, is the current folder, or holds things that we did not write.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        raise ExportError(f"an export must be a folder, but {path} is something else; give another path")
    if path.samefile(os.curdir):
        raise ExportError(
            f"an export takes the place of its folder as a whole, but {path} is the current folder; give another path, "
            "such as export in it"
        )
    names = sorted(file.name for file in path.iterdir())
    if not names:
        return
    if mark not in names:
        raise ExportError(f"only an export may be replaced, but {path} holds other things; give another path")
    if not overwrite:
        raise ExportError(f"{path} holds an export already; give another path, or say that it may be overwritten")
    others = [name for name in names if name != mark and not is_ours(path, name)]
    if others:
        raise ExportError(
            f"an export is replaced with all its files, but {path} also holds {', '.join(others[:3])}; move that away "
            "or give another path"
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with path.open("rb") as file:
        state = hashlib.sha256()
        while chunk := file.read(2**20):
            state.update(chunk)
    return state.hexdigest()


def clear_leftovers(path: Path) -> None:
    """Remove what killed writers of the same folder left, and put back an old folder that one had moved away."""
    if not path.parent.is_dir():
        return
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*{_PARTIAL}"):
        if folder.is_dir() and not folder.is_symlink() and not is_held(folder):
            shutil.rmtree(folder, ignore_errors=True)
    old = _moved_away(path)
    if old.is_dir() and not old.is_symlink() and not is_held(old):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)


def _moved_away(path: Path) -> Path:
    return path.parent / f".{path.name}.hyq-old"


def check_space(folder: Path, size_bytes: int) -> None:
    """Check that the disk of a folder can take some bytes and a little more.

    Raises:
        ExportError: If not.
    """
    free = shutil.disk_usage(folder).free
    if free < size_bytes + _SPARE_BYTES:
        raise ExportError(
            f"the export needs about {size_bytes / 2**20:.0f} MiB, but {folder} has {free / 2**20:.0f} MiB free; "
            "make room or give another path"
        )


def settle(folder: Path) -> None:
    """Set modes and wait until content and names have reached the disk."""
    for file in folder.iterdir():
        file.chmod(FILE_MODE)
        fsync(file)
    folder.chmod(FOLDER_MODE)
    fsync(folder)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def swap_in(new: Path, path: Path) -> None:
    """Give the new folder its name; an old one ends up under the new one's former name, to be removed."""
    if not path.exists() or not any(path.iterdir()):
        new.replace(path)
    elif not _exchange(new, path):
        old = _moved_away(path)
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    fsync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux renameat2), and tell whether the system could."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def as_export_error(error: OSError, path: Path) -> ExportError:
    """Say in a sentence why a folder could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExportError(
            f"the disk of {path} is full ({error.strerror}); nothing was written, make room and export again"
        )
    return ExportError(f"{path} cannot be written: {error}; nothing was written, check the folder and its rights")
