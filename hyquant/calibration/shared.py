"""A folder through which hosts share what they have captured, rendered and measured: the second level of a store.

It holds entries as a store does, under the same keys, so what one host has built no other builds again. It may be
absent, full, slow or damaged: that is a warning, and the store goes on without it.
"""

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor

from hyquant.calibration.store import Entry, Store
from hyquant.file_modes import make_folder

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""A folder that does not answer for so long (a hanging network file system) is left alone from then on."""


class SharedStore(Store):
    """A host's own store that fetches from a shared one what it lacks, and gives it what it has.

    Args:
        root: Folder of the host's own store.
        shared: Folder that all hosts see; it must be there.
        patience_s: Seconds after which a folder that does not answer is left alone.
    """

    def __init__(self, root: str | Path, shared: str | Path, *, patience_s: float = PATIENCE_S) -> None:
        super().__init__(root)
        self._shared = Store(shared)
        self._given: set[str] = set()
        self._is_on = _answers(Path(shared).is_dir, patience_s)
        if not self._is_on:
            logger.warning("a shared folder must answer, but %s does not; this host builds what it lacks", shared)

    def get(self, key: str) -> Entry | None:
        """Return an entry, from the shared folder if it is missing or damaged here; None if it is nowhere."""
        found = super().get(key)
        if found is not None:
            if not self._is_given(key):
                self._give(key, found.tensors, found.meta)
            return found
        fetched: Entry | None = None
        with self._tolerant():
            fetched = self._shared.get(key) if self._is_on else None
        if fetched is not None:
            try:
                super().put(key, fetched.tensors, fetched.meta)
            except OSError as error:
                logger.warning("store entry key=%s needs room in %s, but: %s; free some", key, self.root, error)
            self._given.add(key)
        return fetched

    def put(self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, JsonValue]) -> None:
        """Write an entry here and into the shared folder, replacing what is there.

        Raises:
            OSError: If the host's own folder cannot be written.
        """
        super().put(key, tensors, meta)
        self._give(key, tensors, meta)

    def fetch_folder(self, key: str, is_intact: Callable[[Path], bool]) -> None:
        """Copy an entry of many files here, if it is intact in the shared folder."""
        theirs, own = self._shared.folder(key), self.folder(key)
        with self._tolerant():
            if self._is_on and theirs.is_dir() and _copy(theirs, own, is_intact):
                self._given.add(key)

    def give_folder(self, key: str, is_intact: Callable[[Path], bool]) -> None:
        """Copy an entry of many files into the shared folder, unless an intact one is there."""
        with self._tolerant():
            if self._is_on and key not in self._given:
                _copy(self.folder(key), self._shared.folder(key), is_intact)
                self._given.add(key)

    def _is_given(self, key: str) -> bool:
        with self._tolerant():
            if self._is_on and key not in self._given and self._shared.holds(key):
                self._given.add(key)
        return key in self._given

    def _give(self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, JsonValue]) -> None:
        with self._tolerant():
            if self._is_on:
                self._shared.put(key, tensors, meta)
                self._given.add(key)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._is_on = False
            logger.warning("the shared folder %s gave '%s' and is left alone", self._shared.root, error)


def open_store(root: str | Path, shared: str | Path | None) -> Store:
    """Return a host's store, with its second level if there is a shared folder."""
    return Store(root) if shared is None else SharedStore(root, shared)


def _copy(source: Path, target: Path, is_intact: Callable[[Path], bool]) -> bool:
    """Copy a folder so that others see all of it or nothing; replace a damaged target; say whether it is there."""
    if target.is_dir() and is_intact(target):
        return True
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        new = Path(name) / "new"
        shutil.copytree(source, new, symlinks=True)
        if not is_intact(new):
            return False
        if target.is_dir():
            target.rename(Path(name) / "old")
        try:
            new.rename(target)
        except FileExistsError:  # another process was faster, with the same content
            return is_intact(target)
    return True


def _answers(question: Callable[[], bool], patience_s: float) -> bool:
    """Ask a file system something; one that does not answer in time says no."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(question()), daemon=True)
    thread.start()
    thread.join(patience_s)
    return bool(answers) and answers[0]
