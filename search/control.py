"""Where the float model stands in a study's objectives: a competitor that every quantization has to beat somewhere."""

from collections.abc import Mapping, Sequence

from metrics.registry import known_metrics
from search.metric_names import DROP, WORST


def control_values(objectives: Sequence[str], float_scores: Mapping[str, float]) -> tuple[float | None, ...]:
    """Return the float model's value of each objective, None where it is not known.

    Args:
        objectives: Metric names in the study's order.
        float_scores: Means of the float videos' own metrics, such as clip_prompt, as the study measured them.
    """
    return tuple(float_scores.get(name, _against_itself(name)) for name in objectives)


def _against_itself(name: str) -> float | None:
    base = name.removesuffix(WORST)
    if base == "latency_ratio":
        return 1.0
    if base.endswith(DROP):
        return 0.0
    spec = known_metrics().get(base)
    return None if spec is None else spec.of_itself
