"""Follow the study's database from outside, in plain SQL, and remember every trial that was ever seen finished."""

import threading
from dataclasses import dataclass

import psycopg

FOLLOW_S = 0.5

_FINISHED = """
    SELECT number, state::text,
        (SELECT value_json FROM trial_user_attributes WHERE trial_id = trials.trial_id AND key = 'config_digest'),
        (SELECT array_agg(value ORDER BY objective) FROM trial_values WHERE trial_id = trials.trial_id)
    FROM trials WHERE state IN ('COMPLETE', 'PRUNED', 'FAIL')
"""

_IN_HAND = """
    SELECT value_json::json ->> 'pid' FROM trial_user_attributes JOIN trials USING (trial_id)
    WHERE key = 'worker' AND state = 'RUNNING'
"""


@dataclass(frozen=True)
class Seen:
    """A finished trial as the database told of it."""

    state: str
    digest: str | None
    values: tuple[float, ...] | None


def finished(url: str) -> dict[int, list[Seen]]:
    """Return all finished trials by number; more than one of a number is for the checks to find.

    Raises:
        psycopg.Error: If the database does not answer, or has no tables yet.
    """
    with psycopg.connect(url, connect_timeout=5) as connection:
        rows = connection.execute(_FINISHED).fetchall()
    found: dict[int, list[Seen]] = {}
    for number, state, digest, values in rows:
        found.setdefault(number, []).append(Seen(state, digest, None if values is None else tuple(values)))
    return found


def in_hand(url: str) -> frozenset[int]:
    """Return the process ids of the ranks that have a trial in hand.

    Raises:
        psycopg.Error: As `finished`.
    """
    with psycopg.connect(url, connect_timeout=5) as connection:
        return frozenset(int(pid) for (pid,) in connection.execute(_IN_HAND).fetchall())


class Follower:
    """A thread that looks twice a second; what it has seen stays in `seen`, and what changed later in `changed`.

    `busy` are the process ids that had a trial in hand when it last looked; nobody's while the database is away.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="follower", daemon=True)
        self.seen: dict[int, Seen] = {}
        self.changed: list[str] = []
        self.busy: frozenset[int] = frozenset()

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._is_over.set()
        self._thread.join()

    def evaluated(self) -> set[str]:
        """Return the digests of what was seen evaluated."""
        return {one.digest for one in self.seen.values() if one.state != "FAIL" and one.digest is not None}

    def _work(self) -> None:
        while not self._is_over.wait(FOLLOW_S):
            try:
                now, self.busy = finished(self._url), in_hand(self._url)
            except psycopg.Error:  # it is away, or there are no tables yet
                self.busy = frozenset()
                continue
            for number, (first, *_) in now.items():
                before = self.seen.setdefault(number, first)
                if before != first:
                    self.changed.append(f"trial {number} was {before}, then {first}")
                    self.seen[number] = first
