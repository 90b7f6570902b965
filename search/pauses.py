"""How long a slot that waits for others pauses between two looks at the study."""

from search.lease import RENEW_S


class Pauses:
    """Pauses that begin short, each twice as long as the last one, up to the time in which leases are renewed.

    What is over soon is seen soon, and who waits for an hour asks no more of the database than need be.

    Args:
        first_s: The first pause, in seconds.
    """

    def __init__(self, first_s: float) -> None:
        self._first_s = self._next_s = first_s

    def next_s(self) -> float:
        """Return the length of the pause that begins now, in seconds."""
        pause_s = self._next_s
        self._next_s = min(2 * pause_s, RENEW_S)
        return pause_s

    def end(self) -> None:
        """Begin short again: what was waited for has come."""
        self._next_s = self._first_s
