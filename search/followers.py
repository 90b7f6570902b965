"""What rank 0 says to the other ranks of its slot between two collective stages (`search.ranks.follow` hears it)."""

import time

from hyquant.config import QuantConfig
from hyquant.distributed import Group

KEEP_ALIVE_S = 60.0
"""Other ranks wait for work in a collective call that times out; a sign of life is sent to them this often."""


class Followers:
    """The other ranks of a group, as rank 0 sees them.

    Args:
        group: The group of all ranks of the slot.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._spoken = time.monotonic()

    def run_trial(self, config: QuantConfig) -> None:
        """Let them enter `run_trial` with a config."""
        self._group.broadcast({"command": "trial", "config": config.model_dump(mode="json")})

    def measure_again(self, config: QuantConfig) -> None:
        """Let them enter `measure_again` with a config."""
        self._group.broadcast({"command": "again", "config": config.model_dump(mode="json")})

    def keep_alive(self) -> None:
        """Tell them to go on waiting, if the last time is long enough ago."""
        if time.monotonic() - self._spoken > KEEP_ALIVE_S:
            self._group.broadcast({"command": "idle"})
            self._spoken = time.monotonic()

    def stop(self) -> None:
        """Let them leave."""
        self._group.broadcast({"command": "stop"})
