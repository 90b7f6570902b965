"""Text that a user wrote into a file, read whole: a regular file of bounded size, in UTF-8."""

import stat
from pathlib import Path

MOST_BYTES = 16 * 10**6


def read_text(path: Path) -> str:
    """Return the text of a file.

    A pipe would be waited for without end, and a device may never end.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it cannot be opened.
        ValueError: If it is no regular file, is larger than `MOST_BYTES`, or is not UTF-8; the message says which.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"it must be a file, but is {'a folder' if path.is_dir() else 'a pipe or a device'}")
    if about.st_size > MOST_BYTES:
        raise ValueError(
            f"it must have at most {MOST_BYTES / 1e6:.0f} MB, but has {about.st_size / 1e6:.0f} MB; shorten it"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it must be UTF-8, but byte {error.start} is not; save it as UTF-8") from error
