"""Whether a run grows: the median of all pairwise slopes (Theil-Sen), which single peaks do not move.

Source: P. K. Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968; scipy.stats.theilslopes.
"""

from collections.abc import Callable, Sequence
from typing import Any

from scipy.stats import theilslopes

from tools.soak.run import Soaked
from tools.soak.sample import WATCHED, Held, Sample

HOUR_S = 3600.0
MAX_MEMORY_GROWTH = 0.01
"""Share of the resident memory after the warm-up by which it may grow in an hour."""

MAX_HANDLES = 1.0
"""Handles, and threads, by which their number may drift over the whole time; it goes up and down by some."""

MAX_MIB_PER_TRIAL = 3.0
"""What a trial of the mini study may leave on disk beside its videos: plots, rows of two databases, compiled graphs."""

Amount = Callable[[Held], int]
MEASURED: dict[str, Amount] = {
    "rss": lambda held: held.rss_bytes,
    "pss": lambda held: held.pss_bytes,
    "handles": lambda held: held.handles,
    "threads": lambda held: held.threads,
}


def judged(soaked: Soaked, *, warmup_s: float) -> dict[str, Any]:
    """Return rows with a verdict each, the trials that finished after the warm-up, and whether all rows pass.

    Args:
        soaked: What a run left.
        warmup_s: Samples before it are not judged.

    Raises:
        ValueError: If fewer than three samples come after the warm-up.
    """
    late = [sample for sample in soaked.samples if sample.at_s >= warmup_s]
    if len(late) < 3:
        raise ValueError(f"at least 3 samples must come after the warm-up, but {len(late)} do; run for longer")
    trials = sum(warmup_s <= at <= late[-1].at_s for at in soaked.finished_s)
    rows = [row for role in WATCHED for row in _role_rows(role, late)]
    rows += [_disk_row(late, trials), _videos_row(soaked)]
    return {"trials": trials, "passed": all(row["ok"] == "yes" for row in rows), "rows": rows}


def slope(times_s: Sequence[float], values: Sequence[float]) -> float:
    """Return the median of the slopes of all pairs, per second."""
    return float(theilslopes(values, times_s).slope)


def _role_rows(role: Any, late: Sequence[Sample]) -> list[dict[str, Any]]:
    there = [sample for sample in late if role in sample.roles]
    pids = {sample.roles[role].pids for sample in there}
    if len(pids) != 1 or len(there) != len(late):
        what = f"{len(pids)} sets of processes in {len(there)} of {len(late)} samples"
        return [_row(f"{role} processes", what, "", "the same ones all the time", False)]
    return [_drift_row(role, name, late, amount) for name, amount in MEASURED.items()]


def _drift_row(role: Any, name: str, late: Sequence[Sample], amount: Amount) -> dict[str, Any]:
    times, values = [sample.at_s for sample in late], [amount(sample.roles[role]) for sample in late]
    per_second = slope(times, values)
    start = float(sorted(values[: max(3, len(values) // 10)])[max(3, len(values) // 10) // 2])
    if name in ("rss", "pss"):
        growth = per_second * HOUR_S / start
        limit = f"under {100 * MAX_MEMORY_GROWTH:g} %/h" if name == "rss" else "not judged"
        ok = name != "rss" or growth < MAX_MEMORY_GROWTH
        return _row(f"{role} {name}", f"{start / 2**20:.0f} MiB", f"{100 * growth:+.2f} %/h", limit, ok)
    drift = per_second * (times[-1] - times[0])
    return _row(f"{role} {name}", f"{start:.0f}", f"{drift:+.1f}", f"within {MAX_HANDLES:g}", abs(drift) <= MAX_HANDLES)


def _disk_row(late: Sequence[Sample], trials: int) -> dict[str, Any]:
    first, last = (sum(sample.disk_bytes.values()) / 2**20 for sample in (late[0], late[-1]))
    per_trial = (last - first) / max(1, trials)
    limit = f"under {MAX_MIB_PER_TRIAL:g} MiB a trial"
    return _row("disk", f"{first:.0f} MiB", f"{per_trial:+.2f} MiB a trial", limit, per_trial < MAX_MIB_PER_TRIAL)


def _videos_row(soaked: Soaked) -> dict[str, Any]:
    found = f"{len(soaked.videos)} of {len(soaked.finished_s)} trials"
    return _row("videos", found, "", f"the {len(soaked.kept)} of the policy", soaked.videos == soaked.kept)


def _row(what: str, after_warmup: str, change: str, limit: str, ok: bool) -> dict[str, Any]:
    return {"what": what, "after warm-up": after_warmup, "change": change, "limit": limit, "ok": "yes" if ok else "NO"}
