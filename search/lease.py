"""A trial's lease: its worker renews a counter in it, and whoever looks sees whether the counter still moves.

    worker      lease = 1, 2, 3, ... every RENEW_S seconds, in a thread, for as long as it has the trial in hand
    observer    a counter that has stood still for GRACE_S seconds of the observer's own monotonic clock is lost

No clock of another host is read, so clocks that differ by hours change nothing, and every storage will do, because a
lease is an ordinary user attribute. An observer that could not look for a while (the database was away, the machine
slept) does not hold that time against the workers: between two looks no more than `MAX_STEP_S` is counted.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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


@contextmanager
def leased(trial: optuna.Trial, *, renew_s: float = RENEW_S) -> Iterator[None]:
    """Renew a trial's lease from a thread for the length of a block.

    The thread ends by itself when the trial was taken away or the storage has given up; who tells the trial's result
    then hears of it.
    """
    is_over = threading.Event()

    def renew() -> None:
        count = 0
        while True:
            count += 1
            try:
                trial.set_user_attr(LEASE, count)
            except (UpdateFinishedTrialError, StoreError) as reason:
                logger.warning("the lease of trial %d ends: %r", trial.number, reason)
                return
            if is_over.wait(renew_s):
                return

    thread = threading.Thread(target=renew, name=f"lease-{trial.number}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@dataclass
class _Sight:
    lease: object
    still_s: float


class LeaseWatch:
    """One observer of leases; what it knows begins with its first look.

    Args:
        grace_s: How long a lease may stand still.
        clock: Monotonic seconds of this process.
    """

    def __init__(self, grace_s: float = GRACE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._looked: float | None = None
        self._seen: dict[int, _Sight] = {}

    def lost(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the running ones among trials whose lease has stood still for too long."""
        now = self._clock()
        passed_s = 0.0 if self._looked is None else min(now - self._looked, MAX_STEP_S)
        self._looked = now
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        self._seen = {trial.number: self._sight(trial, passed_s) for trial in running}
        return [trial for trial in running if self._seen[trial.number].still_s >= self._grace_s]

    def _sight(self, trial: FrozenTrial, passed_s: float) -> _Sight:
        before, lease = self._seen.get(trial.number), trial.user_attrs.get(LEASE)
        has_moved = before is None or before.lease != lease
        return _Sight(lease, 0.0 if has_moved or before is None else before.still_s + passed_s)
