"""Which slot measures which member of the front again: claims between hosts, through the study's own attributes.

    confirming:12:HOST/DIGEST    the lease of one slot on member 12, a counter that moves while it measures, then None

A slot writes its claim and reads all claims after that, so of two that claim the same member the later sees the other;
whoever sees another lets go and comes again after a moment. A claim whose counter stands still is that of a dead slot.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import optuna

from hyquant.config import digest
from search.lease import LeaseWatch, renewing
from search.processes import WorkerId

_PREFIX = "confirming"


class MemberClaims:
    """One slot's view of who measures what.

    Args:
        study: The study.
        worker: This slot's rank 0.
        watch: Leases as this process sees them, used for nothing else.
    """

    def __init__(self, study: optuna.Study, worker: WorkerId, watch: LeaseWatch | None = None) -> None:
        self._study = study
        self._me = f"{worker.host}/{digest(worker)}"
        self._watch = watch or LeaseWatch()

    def claim(self, number: int) -> bool:
        """Try to claim a member; False if another slot has it or wants it in this moment."""
        if self._others(number):
            return False
        self._write(number, 0)
        if self._others(number):
            self._write(number, None)
            return False
        return True

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Keep a claimed member for the length of a block, and give it up after it."""
        with renewing(lambda count: self._write(number, count), f"claim-{number}"):
            yield
        self._write(number, None)

    def _others(self, number: int) -> list[str]:
        claims = {
            key: lease
            for key, lease in self._study.user_attrs.items()
            if key.startswith(f"{_PREFIX}:") and lease is not None
        }
        dead = self._watch.stopped(claims)
        return [
            key for key in claims if key.startswith(self._key(number, "")) and key not in dead and self._me not in key
        ]

    def _write(self, number: int, lease: int | None) -> None:
        self._study.set_user_attr(self._key(number, self._me), lease)

    @staticmethod
    def _key(number: int, who: str) -> str:
        return f"{_PREFIX}:{number}:{who}"
