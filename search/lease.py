"""A trial's lease: its worker renews a counter in it, and whoever looks sees whether the counter still moves.

    worker      lease = 1, 2, 3, ... every RENEW_S seconds, in a thread, for as long as it has the trial in hand
    observer    a counter that has stood still for GRACE_S seconds of the observer's own monotonic clock is lost

No clock of another host is read, so clocks that differ by hours change nothing, and every storage will do, because a
lease is an ordinary user attribute. An observer that could not look for a while (the database was away, the machine
slept) does not hold that time against the workers: between two looks no more than `MAX_STEP_S` is counted.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from search.errors import StoreError

logger = logging.getLogger(__name__)

LEASE = "lease"
RENEW_S = 5.0
GRACE_S = 60.0
"""A trial whose lease was not renewed for so long is lost; a dead worker of the same host is noticed at once."""
MAX_STEP_S = 10.0


_Holder = TypeVar("_Holder", bound=Hashable)


@contextmanager
def leased(trial: optuna.Trial) -> Iterator[None]:
    """Renew a trial's lease from a thread for the length of a block.

    The thread ends by itself when the trial was taken away or the storage has given up; who tells the trial's result
    then hears of it.
    """
    with renewing(lambda count: trial.set_user_attr(LEASE, count), f"lease-{trial.number}"):
        yield


@contextmanager
def renewing(renew: Callable[[int], None], name: str, *, renew_s: float = RENEW_S) -> Iterator[None]:
    """Call `renew` with 1, 2, 3, ... from a thread for the length of a block."""
    is_over = threading.Event()

    def work() -> None:
        for count in itertools.count(1):
            try:
                renew(count)
            except (UpdateFinishedTrialError, StoreError) as reason:
                logger.warning("%s ends: %r", name, reason)
                return
            if is_over.wait(renew_s):
                return

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@dataclass(frozen=True)
class _Sight:
    lease: object
    still_s: float


class LeaseWatch:
    """One observer of leases; what it knows begins with its first look.

    Args:
        grace_s: How long a lease may stand still; None is `GRACE_S`.
        clock: Monotonic seconds of this process.
    """

    def __init__(self, grace_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_s = GRACE_S if grace_s is None else grace_s
        self._clock = clock
        self._looked: float | None = None
        self._seen: dict[Hashable, _Sight] = {}

    def stopped(self, leases: Mapping[_Holder, object]) -> set[_Holder]:
        """Look at all leases there are, by who holds them, and return who has not renewed for too long."""
        now = self._clock()
        passed_s = 0.0 if self._looked is None else min(now - self._looked, MAX_STEP_S)
        self._looked = now
        self._seen = {holder: self._sight(holder, lease, passed_s) for holder, lease in leases.items()}
        return {holder for holder in leases if self._seen[holder].still_s >= self._grace_s}

    def lost(self, trials: Sequence[FrozenTrial]) -> set[int]:
        """Return the numbers of running trials whose lease has stood still for too long."""
        leases = {t.number: t.user_attrs.get(LEASE) for t in trials if t.state == TrialState.RUNNING}
        return self.stopped(leases)

    def doubtful(self) -> set[Hashable]:
        """Return who had not renewed for half the grace at the last look: others may have seen it for the whole."""
        return {holder for holder, sight in self._seen.items() if sight.still_s >= self._grace_s / 2}

    def _sight(self, holder: Hashable, lease: object, passed_s: float) -> _Sight:
        before = self._seen.get(holder)
        return _Sight(lease, 0.0 if before is None or before.lease != lease else before.still_s + passed_s)
