"""Room on disk: what a trial is going to write, whether there is room for it, and waiting for room.

    files of a trial   what earlier trials of the store left in MLflow, of those that still have their video, else a
                       quarter of its pictures' raw bytes; three times, as they lie in the temporary folder, the spool
                       and MLflow for a moment
    once per study     float clips, and records of the calibration prompts (latents and text of every step)

A disk that refuses in the middle fails the trial as an affair of the machine and not of its config: it is queued again
and the slot waits, longer each time, for at most `timeouts.room_s`.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from search.errors import StoreError
from search.study import StudyConfig

logger = logging.getLogger(__name__)

RESERVE_BYTES = 64 * 2**20
"""Left for databases and logs."""
FULL_BYTES = 2**20
"""With less than this a database on the disk cannot take what a trial found out."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0

_COPIES = 3
_VIDEO = "videos.mp4"
_SHOWN_SAMPLES, _LOOKED_AT = 8, 16
_TEXT_BYTES = 8 * 2**20  # of one prompt: 256 tokens of 4096 channels, twice, in float32
_LATENT_CHANNELS, _SPACE, _TIME = 16, 8, 4  # HunyuanVideo's VAE


def trial_bytes(config: StudyConfig, store: Path) -> int:
    """Return how much one trial's files take at their peak, in bytes."""
    settings = config.workload.settings
    looked_at = islice((store / "artifacts").glob("*/artifacts"), _LOOKED_AT)
    whole = [folder for folder in looked_at if (folder / _VIDEO).is_file()]  # a policy may have taken others' files
    sizes = [sum(file.stat().st_size for file in folder.glob("*") if file.is_file()) for folder in whole]
    shown = min(_SHOWN_SAMPLES, config.workload.num_search_prompts)
    raw_bytes = shown * 2 * 3 * settings.num_frames * settings.height * settings.width
    return _COPIES * (max(sizes, default=0) or raw_bytes // 4)


def first_bytes(config: StudyConfig) -> int:
    """Return how much the first trial of a study adds to the cache, in bytes."""
    workload, settings = config.workload, config.workload.settings
    pixels = settings.num_frames * settings.height * settings.width
    latents = ((settings.num_frames - 1) // _TIME + 1) * settings.height * settings.width // _SPACE**2
    clips = workload.num_search_prompts * 3 * 4 * pixels
    records = workload.num_calibration_prompts * (settings.num_steps * _LATENT_CHANNELS * 4 * latents + _TEXT_BYTES)
    return clips + records


def trial_shortage(config: StudyConfig, store: Path, num_evaluated: int) -> str | None:
    """Return in a sentence why there is no room for one more trial, or None."""
    own = trial_bytes(config, store)
    needed = own + (0 if num_evaluated else first_bytes(config))
    places = {store: needed, Path(tempfile.gettempdir()): own}
    return next(
        filter(None, (_shortage("the next trial writes", bytes_, place) for place, bytes_ in places.items())), None
    )


def run_shortage(config: StudyConfig, store: Path, num_evaluated: int) -> str | None:
    """Return in a sentence why a study's remaining trials may not all find room in its store, or None."""
    remaining = max(0, config.budget.trials - num_evaluated)
    needed = remaining * trial_bytes(config, store) // _COPIES + (0 if num_evaluated else first_bytes(config))
    return _shortage(f"the {remaining} trials to come write", needed, store) if remaining else None


def fullness(store: Path) -> str | None:
    """Return in a sentence that a store's disk is full, so that trials in hand cannot be written down; else None."""
    free = shutil.disk_usage(store).free
    if free >= FULL_BYTES:
        return None
    return f"results of trials need at least {_mib(FULL_BYTES)}, but {store} has {free // 1024} KiB free; free some"


def cannot_be_written(store: Path, url: str | None) -> bool:
    """Say whether a study's database is SQLite in a store whose disk is full: it still answers, and nobody can renew.

    What is read then tells nothing about workers.
    """
    return url is None and fullness(store) is not None


def _shortage(what: str, needed: int, place: Path) -> str | None:
    free = shutil.disk_usage(place).free
    if free >= needed + RESERVE_BYTES:
        return None
    return (
        f"{what} about {_mib(needed)} beside a reserve of {_mib(RESERVE_BYTES)}, but {place} has {free // 2**20} MiB "
        "free; free some"
    )


def _mib(size: int) -> str:
    return f"{-(-size // 2**20)} MiB"


class RoomWatch:
    """One slot's waiting for room.

    Args:
        shortage: Says why there is no room, None if there is.
        limit_s: How long a slot waits in all before it gives up.
        clock: Monotonic seconds.
    """

    def __init__(
        self, shortage: Callable[[], str | None], limit_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shortage = shortage
        self._limit_s = limit_s
        self._clock = clock
        self._since: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._not_before = 0.0
        self._refusal = ""

    def has_room(self) -> bool:
        """Say whether a trial may begin.

        Raises:
            StoreError: If there has been no room for too long.
        """
        now = self._clock()
        sentence = self._shortage() or (self._refusal if now < self._not_before else None)
        if sentence is None:
            if not self._refusal:
                self._since = None
            return True
        if self._since is None:
            self._since = now
            logger.warning("waiting for room: %s", sentence)
        if now - self._since > self._limit_s:
            raise StoreError(f"a trial needs room within {self._limit_s:.0f} s (timeouts.room_s), but {sentence}")
        return False

    def refused(self, reason: str) -> None:
        """Take note that the disk refused something: the next trial begins after a pause, longer each time."""
        now = self._clock()
        self._refusal = reason
        self._since = now if self._since is None else self._since
        self._not_before = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        logger.warning("waiting for room: %s", reason)

    def went_well(self) -> None:
        """Take note that a trial found room."""
        self._since, self._refusal, self._pause_s = None, "", FIRST_PAUSE_S
