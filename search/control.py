"""Where the float model stands in a study's objectives: a competitor that every quantization has to beat somewhere."""

from collections.abc import Mapping, Sequence

AGAINST_ITSELF = {
    "latency_ratio": 1.0,
    "clip_reference": 1.0,
    "ssim": 1.0,
    "motion_energy_ratio": 1.0,
    "clip_prompt_drop": 0.0,
    "collapsed": 0.0,
}
"""What float scores against float; `psnr_db` is infinite there and therefore left out."""


def control_values(objectives: Sequence[str], float_scores: Mapping[str, float]) -> tuple[float | None, ...]:
    """Return the float model's value of each objective, None where it is not known.

    Args:
        objectives: Metric names in the study's order.
        float_scores: Means of the float videos' own metrics, such as clip_prompt, as the study measured them.
    """
    known = {**AGAINST_ITSELF, **float_scores}
    return tuple(known.get(name) for name in objectives)
