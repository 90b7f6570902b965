"""What the kernel does for a process whose parent ends."""

import ctypes
import signal
import sys

AGENT_VARIABLE = "HYQ_AGENT"
"""Environment variable in which a slot's agent gives its ranks its process id, so that they know another parent."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def send_when_parent_ends(number: signal.Signals) -> None:
    """Let the kernel send this process a signal when its parent ends; on systems other than Linux nothing is sent.

    Source: prctl(2), PR_SET_PDEATHSIG. A parent that has ended before is not noticed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
