"""What a run of a fuzzer did and found."""

import hashlib
import sys
import time
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from tools.fuzz.oracle import Finding


@dataclass
class Tally:
    """What a run did so far, and where what it finds is written; it is over after `limit_s` seconds of computing."""

    target: str
    folder: Path
    limit_s: float
    started_s: float = field(default_factory=time.monotonic)
    executions: int = 0
    places: dict[str, Path] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Say whether the time is up."""
        return time.process_time() >= self.limit_s

    def count(self, payload: bytes, finding: Finding | None, *, unless: Set[str] | None = None) -> None:
        """Count an execution, and keep the last input of a defect whose place is not known before it.

        Args:
            payload: The input.
            finding: What is wrong, None if nothing.
            unless: Places that are known; None for all that were found.
        """
        self.executions += 1
        if finding is None or finding.place in (self.places if unless is None else unless):
            return
        name = f"{self.target}-{hashlib.sha256(payload).hexdigest()[:12]}"
        for suffix in ("", ".txt") if finding.place in self.places else ():
            self.places[finding.place].with_suffix(suffix).unlink()
        self.places[finding.place] = self.folder / "findings" / name
        self.places[finding.place].write_bytes(payload)
        self.places[finding.place].with_suffix(".txt").write_text(f"{finding.place}\n{finding.text}")

    def report(self) -> int:
        """Print the result and return the exit code."""
        computed, minutes = time.process_time() / 60, (time.monotonic() - self.started_s) / 60
        spent = f"{computed:.1f} minutes of computing ({minutes:.1f} by the clock)"
        print(f"{self.target}: {self.executions} executions in {spent}, {len(self.places)} findings")
        for place, path in self.places.items():
            print(f"  {place}: {path}")
        sys.stdout.flush()
        return int(bool(self.places))
