"""Leaving a denoiser call when nothing that is watched is still to come."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class _NothingLeft(Exception):
    pass


class EarlyEnd:
    """Ends calls of one denoiser early: the first one runs whole and shows how often each watched module is called."""

    def __init__(self) -> None:
        self._usual: Counter[str] | None = None
        self._seen: Counter[str] = Counter()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Run one call of the denoiser; what is left of it when all that is watched has been seen does not run."""
        self._seen = Counter()
        with suppress(_NothingLeft):
            yield
        if self._usual is None:
            self._usual = self._seen

    def saw(self, name: str) -> None:
        """Note a call of a watched module, after everything else that is done with it; it may not return."""
        self._seen[name] += 1
        if self._usual is not None and self._seen >= self._usual:
            raise _NothingLeft
