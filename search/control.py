"""Where the float model stands in a study's objectives: a competitor that every quantization has to beat somewhere."""

from collections.abc import Mapping, Sequence

from metrics.registry import known_metrics
from search.metric_names import DROP, EXCESS, LATENT_L2, WORST
from search.noise_floor import NoiseFloor


def control_values(
    objectives: Sequence[str], float_scores: Mapping[str, float], floor: NoiseFloor | None = None
) -> tuple[float | None, ...]:
    """Return the float model's value of each objective, None where it is not known.

    Over the noise floor it is at minus the floor: its videos are the float videos themselves. The seconds of its loop
    are not known here, since every trial has its own: see `search.picks`.

    Args:
        objectives: Metric names in the study's order.
        float_scores: Means of the float videos' own metrics, such as clip_prompt, as the study measured them.
        floor: The study's noise floor; None until it is measured.
    """
    known = {**float_scores, **({} if floor is None else _below_floor(floor))}
    return tuple(known.get(name, _against_itself(name)) for name in objectives)


def _below_floor(floor: NoiseFloor) -> dict[str, float]:
    means = {f"{name}{EXCESS}": -one.mean for name, one in floor.metrics.items()}
    worst = {f"{name}{EXCESS}{WORST}": -min(one.distances) for name, one in floor.metrics.items()}
    return means | worst


def _against_itself(name: str) -> float | None:
    base = name.removesuffix(WORST)
    if base == "latency_ratio":
        return 1.0
    if base == LATENT_L2:
        return 0.0
    if base.endswith(DROP):
        return 0.0
    spec = known_metrics().get(base)
    return None if spec is None else spec.of_itself
