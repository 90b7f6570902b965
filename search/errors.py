"""The errors the search application raises on purpose.

    SearchError
    ├── TrialFailed       one trial could not finish; carries stage, rank and log
    │   ├── OutOfMemory   because a rank had no memory left
    │   └── DiskTrouble   because a disk was full or broken, whatever the config
    ├── StudyMismatch     a stored study does not belong to this study file
    ├── StoreError        the study's databases are missing, locked or out of space
    │   └── EmptyStore    there are none yet
    └── InstallError      a package or file this installation needs is missing
    StageBug              what nobody expected in a trial (a RuntimeError); ends the workers, carries the same

Every message is one sentence with three parts: the rule, the values, the way out.
"""


class SearchError(Exception):
    """Base of everything the search application raises on purpose."""


class _OfStage(Exception):
    """What happened in a stage of a trial.

    Attributes:
        stage: Where: "quantize", "render", "score", "latency".
        reason: What happened, in words.
        rank: The rank that met it.
        log: The last lines of that rank's traceback.
    """

    def __init__(self, stage: str, reason: str, *, rank: int = 0, log: str = "") -> None:
        super().__init__(f"stage {stage} on rank {rank}: {reason}")
        self.stage = stage
        self.reason = reason
        self.rank = rank
        self.log = log


class TrialFailed(_OfStage, SearchError):
    """A trial could not finish."""


class OutOfMemory(TrialFailed):
    """A trial could not finish because a rank had no memory left."""


class DiskTrouble(TrialFailed):
    """A trial could not finish because a disk was full, or did not read or write: no fault of its config."""


class StageBug(_OfStage, RuntimeError):
    """Something nobody expected inside a trial, on whichever rank: it ends the workers of the slot."""


class StudyMismatch(SearchError):
    """A stored study was made from another study file."""


class StoreError(SearchError):
    """A database or folder of the study cannot be used."""


class EmptyStore(StoreError):
    """A database or folder holds no studies yet."""


class InstallError(SearchError):
    """A package or file that this installation needs is missing."""
