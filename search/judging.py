"""From scores of all pairs to a certificate's verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metrics.registry import find_metric
from metrics.statistics.verdict import combined
from search.certificate import Certificate
from search.margin_verdicts import PairedScores, margin_verdicts, most_of
from search.margins import Margin


@dataclass(frozen=True)
class Scores:
    """What was measured on all pairs.

    Attributes:
        values: Scores of the candidate's clips by metric, in the order of the pairs.
        float_values: The same of the float clips; for metrics with a reference, of a clip against itself.
        kernels: Kernels that the quantized Linears ran on.
    """

    values: Mapping[str, Sequence[float]]
    float_values: Mapping[str, Sequence[float]]
    kernels: tuple[str, ...]


def judged(unjudged: Certificate, margins: Sequence[Margin], scores: Scores) -> Certificate:
    """Return a certificate with the verdicts that scores amount to."""
    paired = [
        PairedScores(
            spec=find_metric(margin.metric),
            margin=margin,
            values=tuple(scores.values[margin.metric]),
            float_values=tuple(scores.float_values[margin.metric]),
        )
        for margin in margins
    ]
    verdicts = margin_verdicts(paired, [pair.prompt for pair in unjudged.pairs], alpha=unjudged.alpha)
    verdict = combined(metric.verdict for metric in verdicts)
    needed = most_of(metric.new_prompts for metric in verdicts if metric.verdict == "INCONCLUSIVE")
    return unjudged.model_copy(
        update={
            "verdict": verdict,
            "metrics": verdicts,
            "new_prompts": needed if verdict == "INCONCLUSIVE" else None,
        }
    )
