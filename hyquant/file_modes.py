"""Who may read what is written: owner and group. Modes are set, and not left to the umask, which differs by user.

Files are renamed into place after their mode is set; `hyquant.calibration.store.fill_atomically` does that.
"""

from pathlib import Path

FOLDER_MODE = 0o750
FILE_MODE = 0o640
"""The engine refuses files that others may read or that the group may write."""


def make_folder(path: Path) -> None:
    """Make a folder, and the missing ones above it, with mode 0750; those that are there stay as they are.

    Raises:
        OSError: If one cannot be made.
    """
    missing = [one for one in (path, *path.parents) if not one.exists()]
    for folder in reversed(missing or [path]):
        try:
            folder.mkdir(mode=FOLDER_MODE)
        except OSError:  # another process was faster, or it is there, which systems may say in other words
            if not folder.is_dir():
                raise
        else:
            folder.chmod(FOLDER_MODE)
