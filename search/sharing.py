"""Which slot measures which member of the front again: claims between hosts, through the study's own attributes.

    confirming:12:HOST/DIGEST    the claim of one slot on member 12: its worker and a lease, which moves while it
                                 measures; then None

A slot writes its claim and reads all claims after that, so of two that claim the same member the later sees the other;
whoever sees another lets go and comes again after a moment. A claim whose lease stands still is that of a dead slot, or
of one that its runner ends (`search.watching`).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna

from hyquant.config import FrozenModel
from search.lease import LeaseWatch, renewing
from search.processes import ProcessId, WorkerId, is_given_up, is_local

_PREFIX = "confirming"


class MemberClaim(FrozenModel):
    """One slot's claim: who measures, and a counter that it renews."""

    worker: WorkerId
    lease: int


class MemberClaims:
    """One slot's view of who measures what.

    Args:
        study: The study.
        worker: This slot's rank 0.
        watch: Leases as this process sees them, used for nothing else.
    """

    def __init__(self, study: optuna.Study, worker: WorkerId, watch: LeaseWatch | None = None) -> None:
        self._study = study
        self._worker = worker
        self._me = worker.key
        self._watch = watch or LeaseWatch()

    def claim(self, numbers: Iterable[int]) -> int | None:
        """Claim the first of these members that no other slot has, or wants in this moment; None if there is none."""
        others = self._of_others()
        for number in numbers:
            if number in others:
                continue
            self._write(number, 0)
            others = self._of_others()
            if number not in others:
                return number
            self._write(number, None)
        return None

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Keep a claimed member for the length of a block, and give it up after it."""
        with renewing(lambda count: self._write(number, count), f"claim-{number}"):
            yield
        self._write(number, None)

    def _of_others(self) -> set[int]:
        """Return the members that others have or want, as far as their leases move."""
        claims = member_claims(self._study.user_attrs)
        dead = self._watch.stopped(claims)
        return {_member(key) for key in claims if key not in dead and self._me not in key}

    def _write(self, number: int, lease: int | None) -> None:
        claim = None if lease is None else MemberClaim(worker=self._worker, lease=lease).model_dump()
        self._study.set_user_attr(self._key(number, self._me), claim)

    @staticmethod
    def _key(number: int, who: str) -> str:
        return f"{_PREFIX}:{number}:{who}"


def drop_dead(
    study: optuna.Study, claims: Mapping[str, MemberClaim], runner: ProcessId
) -> Iterator[tuple[int, MemberClaim]]:
    """Give up the claims of workers of this host that are dead, and yield those of a runner with their members.

    Args:
        study: The study.
        claims: All there are.
        runner: Who looks. Workers of others that live are left to them; what ended one with its runner nobody knows.
    """
    for key, claim in claims.items():
        if is_local(claim.worker) and is_given_up(claim.worker, runner):
            study.set_user_attr(key, None)
            if claim.worker.runner == runner:
                yield _member(key), claim


def _member(key: str) -> int:
    return int(key.split(":")[1])


def member_claims(attributes: Mapping[str, Any]) -> dict[str, MemberClaim]:
    """Return the claims there are among a study's own attributes, by key."""
    held = {k: value for k, value in attributes.items() if k.startswith(f"{_PREFIX}:") and value is not None}
    return {key: MemberClaim.model_validate(value) for key, value in held.items()}
