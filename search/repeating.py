"""Repeat a certificate on the present software: which metrics moved, and by more than float itself did?

Both models are rendered anew and every clip is held against the one of the certificate. How far the float clips moved
is the floor: that much changes without any quantization. A metric moved if the candidate's clips are shown to have
moved farther (`search.moves`).

    metrics with a reference   what a clip of today scores with the old clip as its reference, short of a perfect score
    other metrics              how far the score of the clip moved

The old clips come from the store's cache. Where they are gone, which is said before anything is rendered, moves are
those of the scores, and floors of metrics with a reference are not known.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hyquant.calibration.store import Store
from hyquant.config import FrozenModel
from hyquant.holding import held
from metrics.base import Sample
from metrics.registry import find_metric
from metrics.score import score_samples
from metrics.statistics.verdict import Verdict
from search.certificate import Certificate, binding_problems
from search.certifying import (
    ClipStore,
    OnProgress,
    Subject,
    candidate_key,
    float_key,
    load_judge,
    now,
    require_weights,
    score_pairs,
    software_of,
)
from search.clip_space import require_room, writing_to
from search.errors import SearchError
from search.judging import Scores, judged
from search.locks import at_work
from search.metric_names import has_drop
from search.moves import Move, PairMoves, judged_moves
from search.rendering import load_float_model

logger = logging.getLogger(__name__)


class Repetition(FrozenModel):
    """A certificate's clips rendered and judged again.

    Attributes:
        certificate: The certificate as today's clips would have it; it is not written anywhere.
        before: The verdict of the certificate that was repeated.
        moves: One per metric.
        changed_software: What differs, as "torch 2.9.0 -> 2.10.0".
    """

    certificate: Certificate
    before: Verdict
    moves: tuple[Move, ...]
    changed_software: tuple[str, ...]

    @property
    def is_as_before(self) -> bool:
        """Say whether it passes today and nothing moved, unless by no more than float did."""
        return self.certificate.verdict == "PASS" and all(move.is_beyond_floor is False for move in self.moves)


def repeat_certificate(
    old: Certificate, export: Path, *, store: Path, device: str = "auto", on_progress: OnProgress = lambda _: None
) -> Repetition:
    """Render and judge a certificate's pairs again, with the same margins.

    Args:
        old: The certificate of the export.
        export: Folder of the export.
        store: Where clips were kept when it was certified; those of today are kept there too until they are judged.
        device: "auto", or a device as torch writes it.
        on_progress: Told what is being done, one line at a time.

    Raises:
        HyquantError: If the model or the export cannot be loaded.
        MetricError: If the weights of a metric are missing.
        SearchError: If the export is not the one that was certified, the store has no room for clips, or they cannot be
            scored.
    """
    if problem := next(binding_problems(export, old), None):
        raise SearchError(f"only what was certified can be repeated, but {problem}")
    names = [metric.metric for metric in old.metrics]
    require_weights(names)
    require_room(store, old.settings, 2 * len(old.pairs))
    model = load_float_model(export, device=device)
    with (
        writing_to(store),
        at_work(store, "certify"),
        tempfile.TemporaryDirectory(prefix=".again-", dir=store) as folder,
        held(Path(folder)),
    ):
        subject = Subject(
            model=model,
            export=export,
            pairs=old.pairs,
            settings=old.settings,
            judge=load_judge(old.judge, model),
            clips=ClipStore(folder),
        )
        kept, paired = Store(store / "cache"), _paired(names)
        if paired and (num_gone := _num_gone(old, subject, kept)):
            logger.warning(
                "%d of %d clips of then are not in %s, so floors of %s stay unknown; give the --store of then for them",
                num_gone,
                2 * len(old.pairs),
                store,
                ", ".join(paired),
            )
        scores = score_pairs(subject, names, on_progress)
        moves = _moves(old, subject, kept, scores)
    software = software_of(model, scores)
    certificate = judged(
        old.model_copy(update={"created": now(), "software": software}),
        [metric.margin for metric in old.metrics],
        scores,
    )
    return Repetition(
        certificate=certificate,
        before=old.verdict,
        moves=judged_moves(
            old.metrics, certificate.metrics, moves, [pair.prompt for pair in old.pairs], alpha=old.alpha
        ),
        changed_software=_changes(old, certificate),
    )


def _paired(names: Sequence[str]) -> list[str]:
    """Return the metrics with a reference, whose floors need the clips of then."""
    return [name for name in names if not has_drop(find_metric(name))]


def _num_gone(old: Certificate, subject: Subject, kept: Store) -> int:
    """Count the clips of then that a store does not hold."""
    as_before = replace(subject, software=_software_before(old))
    return sum(
        not kept.holds(key_of(as_before, pair.prompt, pair.seed))
        for pair in old.pairs
        for key_of in (float_key, candidate_key)
    )


def _moves(old: Certificate, subject: Subject, kept: Store, scores: Scores) -> dict[str, PairMoves]:
    """Return the moves of all clips by metric."""
    paired = _paired([metric.metric for metric in old.metrics])
    candidate = _scored_against_old(old, subject, kept, candidate_key, paired)
    floats = _scored_against_old(old, subject, kept, float_key, paired)
    found: dict[str, PairMoves] = {}
    for metric in old.metrics:
        name, own = metric.metric, metric.float_values
        of_scores = _distances(scores.values[name], [math.nan if value is None else value for value in metric.values])
        if name not in paired:
            found[name] = PairMoves(of_scores, _distances(scores.float_values[name], own))
        elif candidate is None or floats is None:
            found[name] = PairMoves(of_scores, None)
        else:
            found[name] = PairMoves(_distances(candidate[name], own), _distances(floats[name], own))
    return found


def _scored_against_old(
    old: Certificate, subject: Subject, kept: Store, key_of: Callable[[Subject, str, int], str], names: Sequence[str]
) -> dict[str, list[float]] | None:
    """Return what today's clips score with the old ones as their references, None if an old one is gone."""
    scores = {name: list[float]() for name in names}
    as_before = replace(subject, software=_software_before(old))
    for pair in subject.pairs:
        today = subject.clips.get(key_of(subject, pair.prompt, pair.seed))
        before = kept.get(key_of(as_before, pair.prompt, pair.seed))
        if before is None:
            return None
        assert today is not None, "it was rendered a moment ago"
        sample = Sample(pair.prompt, today.tensors["video"], before.tensors["video"])
        for name, values in score_samples([sample], names, subject.judge).items():
            scores[name] += values
    return scores


def _software_before(old: Certificate) -> dict[str, str]:
    """Return what a certificate's clips were rendered with, as `rendering_software` has it."""
    packages = old.software.packages
    return {
        "torch": packages.get("torch", ""),
        "diffusers": packages.get("diffusers", ""),
        "device": old.software.device.split(",")[0],
    }


def _distances(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(ones, others, strict=True)]


def _changes(old: Certificate, new: Certificate) -> tuple[str, ...]:
    """Say what differs between two software stacks."""
    before = {**old.software.packages, "device": old.software.device, "kernels": ", ".join(old.software.kernels)}
    after = {**new.software.packages, "device": new.software.device, "kernels": ", ".join(new.software.kernels)}
    return tuple(
        f"{name} {before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    )
