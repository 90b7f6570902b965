"""From adjusted p values to PASS, FAIL or INCONCLUSIVE."""

from collections.abc import Iterable
from typing import Literal

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


def verdict_of(p_within: float, p_beyond: float, alpha: float) -> Verdict:
    """Return what one metric's two tests say.

    Args:
        p_within: Adjusted p value of "it is at or beyond its margin"; small values speak for the model.
        p_beyond: Adjusted p value of "it is at or within its margin"; small values speak against it.
        alpha: Error rate of either decision.
    """
    if p_within <= alpha:
        return "PASS"
    return "FAIL" if p_beyond <= alpha else "INCONCLUSIVE"


def combined(verdicts: Iterable[Verdict]) -> Verdict:
    """Return PASS if all pass, FAIL if any fails, else INCONCLUSIVE."""
    found = set(verdicts)
    if "FAIL" in found:
        return "FAIL"
    return "PASS" if found == {"PASS"} else "INCONCLUSIVE"
