"""What others see of a process, without passwords: its command line and all that it writes to its error output."""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path

from search.redaction import blotted, redacted

_ARG_START = 48  # field of /proc/PID/stat: address of the command line in the process's memory


def conceal_passwords() -> None:
    """Hide the passwords of this process, from now on; remarks, logs, warnings and tracebacks go to the error output.

    On Linux every user of a host can read command lines; elsewhere this one stays as it is.
    """
    sys.stderr = _Redacting(
        sys.stderr.buffer, encoding=sys.stderr.encoding, errors="backslashreplace", line_buffering=True
    )
    with suppress(OSError):
        _blot_command_line()


class _Redacting(io.TextIOWrapper):
    """Text whose every piece is redacted as it is written."""

    def write(self, text: str) -> int:
        """Write a text without its passwords."""
        super().write(redacted(text))
        return len(text)


def _blot_command_line() -> None:
    """Write stars over the passwords in this process's own command line.

    Source: proc_pid_stat(5), proc_pid_cmdline(5), proc_pid_mem(5): arguments end with a zero byte, and /proc/self/mem
        is written at addresses.
    """
    process = Path("/proc/self")
    shown = (process / "cmdline").read_bytes().decode("latin-1")
    hidden = "\0".join(blotted(argument) for argument in shown.split("\0"))
    if hidden == shown:
        return
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    with (process / "mem").open("r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), hidden.encode("latin-1"), int(fields[_ARG_START - 3]))
