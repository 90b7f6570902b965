"""One thing in which the parts of a study contradict each other, and how it is mended."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from search.errors import StoreError


class Finding(NamedTuple):
    """What is wrong.

    Attributes:
        part: Which part of the study it is about, such as "cache".
        what: What was found, without a full stop.
        way_out: What `--repair` does about it, or what the user can do.
        mend: Does it; several findings may share one. None if nothing can be done from here.
    """

    part: str
    what: str
    way_out: str
    mend: Callable[[], object] | None = None

    @property
    def sentence(self) -> str:
        """Return what makes it the same finding when it is found again."""
        return f"{self.part}: {self.what}"


def mend(findings: Iterable[Finding]) -> dict[str, str]:
    """Mend what can be mended, each thing once; return why something failed, by the sentences of what shares it.

    What fails is found again by whoever looks again.
    """
    sharing: dict[Callable[[], object], list[Finding]] = {}
    for finding in findings:
        if finding.mend is not None:
            sharing.setdefault(finding.mend, []).append(finding)
    reasons: dict[str, str] = {}
    for action, shared in sharing.items():
        try:
            action()
        except (StoreError, OSError) as error:
            reasons |= {finding.sentence: str(error) for finding in shared}
    return reasons
