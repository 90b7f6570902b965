"""What a reader may do with a damaged file: take it, or refuse it with one known error in a short sentence.

Everything else is a finding: another exception, a long or empty message, more than `PATIENCE_S` seconds of computing,
more than `MEMORY` bytes on top, a file changed outside the folder it was given, a process started, a connection opened,
or a class that a pickle asked for.
"""

import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hyquant.errors import HyquantError
from metrics.errors import MetricError
from search.errors import SearchError

KNOWN = (HyquantError, SearchError, MetricError)
PATIENCE_S = 10.0
MEMORY = 2**30
LONGEST = 20_000
"""Characters of a message; a file that breaks many rules is told all of them."""

_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
              "socket.connect", "socket.getaddrinfo")  # fmt: skip
_CHANGING = ("os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod")


class Escape(BaseException):
    """A reader reached for what no reader may touch."""


class Hang(BaseException):
    """A reader computed for too long."""


@dataclass(frozen=True)
class Finding:
    """What went wrong: `place` names it, so that one defect is reported once."""

    place: str
    text: str


class Oracle:
    """Judges calls of readers in this process, which it guards from the first one on.

    Args:
        folder: The only folder, but for the system's temporary ones, in which files may change.
    """

    def __init__(self, folder: Path) -> None:
        self._allowed = tuple(os.path.realpath(place) for place in (folder, "/dev", "/proc/self"))
        self._watching = False
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGVTALRM, self._too_long)
        used = sum(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
                   if line.startswith("VmData"))  # fmt: skip
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, resource.RLIM_INFINITY))

    def judge(self, read: Callable[[], object]) -> Finding | None:
        """Run a reader on its file and return what it did wrong, None if nothing."""
        signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE_S)
        self._watching = True
        try:
            read()
        except KNOWN as error:
            self._watching = False
            return _told_badly(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever else comes is a finding, and the next input's turn
            self._watching = False
            return Finding(_place(error), "".join(traceback.format_exception(error)))
        finally:
            self._watching = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        return None

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event in _FORBIDDEN:
            raise Escape(f"{event} {args!r:.200}")
        is_written = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        for path in args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]:
            if (is_written or event in _CHANGING) and isinstance(path, str | bytes):
                self._require_inside(event, os.fsdecode(path))

    def _require_inside(self, event: str, path: str) -> None:
        real = os.path.realpath(path)
        if not any(real == place or real.startswith(place + os.sep) for place in self._allowed):
            raise Escape(f"{event} {path!r}")

    def _too_long(self, number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {PATIENCE_S:g} s of computing")


def _told_badly(error: Exception) -> Finding | None:
    text = str(error)
    if text.strip() and len(text) <= LONGEST and "errors.pydantic.dev" not in text and "Traceback" not in text:
        return None
    return Finding(f"message of {_place(error)}", f"{len(text)} characters: {text[:2000]}")


def _place(error: BaseException) -> str:
    """Return kind of error and the innermost line of ours."""
    root = str(Path(__file__).parents[2])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(root)]
    ours = [frame for frame in frames if "/tools/fuzz/" not in frame.filename and "/.venv/" not in frame.filename]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
    return f"{type(error).__name__} at {where}"


def guarded_folder() -> tuple[Path, Oracle]:
    """Return a new folder, which is also the system's temporary one from here on, and the oracle that guards it."""
    folder = Path(tempfile.mkdtemp(prefix="hyq-fuzz-"))
    tempfile.tempdir = str(folder)
    return folder, Oracle(folder)
