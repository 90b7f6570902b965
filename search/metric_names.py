"""Names a study file may use: metrics of rendered videos, how much they lost against float, and what is measured.

clip_prompt, psnr_db, ...       metrics.registry; per prompt
clip_prompt_drop, ...           how much worse than the float video of the same prompt; for metrics without reference
clip_reference_excess, ...      how much farther from the float video than the noise floor; for metrics with reference
clip_prompt_worst, ...          the value of the worst prompt, of every metric, drop and excess
latency_ratio, latency_s        loop latency over the float control's, and in seconds
weight_bytes, peak_memory_bytes
latent_l2                       relative L2 error of the final latents against float's, mean over prompts
"""

from collections.abc import Callable, Iterable, Iterator

from hyquant.models.base import RenderSettings
from metrics.base import MetricSpec
from metrics.errors import MetricError, did_you_mean
from metrics.registry import find_metric, known_metrics
from search.margin_verdicts import FLAG_UNIT, allowed_share
from search.margins import Margin
from search.study import StudyConfig

LATENT_L2 = "latent_l2"
MEASURED = ("latency_ratio", "latency_s", "weight_bytes", "peak_memory_bytes", LATENT_L2)
DROP = "_drop"
EXCESS = "_excess"
WORST = "_worst"


def has_drop(spec: MetricSpec) -> bool:
    """Say whether a float video alone has a value of this metric, so that a candidate can fall behind it."""
    return "reference" not in spec.needs


def has_excess(spec: MetricSpec) -> bool:
    """Say whether a metric compares with the float video, so that it has a noise floor and an excess over it."""
    return "reference" in spec.needs


def unknown_metrics(config: StudyConfig) -> list[str]:
    """Return one sentence per metric of a study that nobody computes, that is judged but not listed, or that cannot be.

    The last are metrics of frames too small for them, and margins that nothing can keep or break.
    """
    problems = []
    for name in config.metrics:
        try:
            find_metric(name)
        except MetricError as error:
            problems.append(f"metrics: {error}")
    if problems:
        return problems
    figures = computed_figures(config.metrics)
    wanted = [("objectives", objective.metric) for objective in config.objectives]
    wanted += [("constraints", constraint.metric) for constraint in config.constraints]
    section = config.certificate
    margins = () if section is None else section.margins
    scored = [margin for margin in margins if margin.metric in config.metrics]
    unscored = [margin.metric for margin in margins if margin.metric not in config.metrics]
    clips = [("metrics", config.metrics, "workload.settings", config.workload.settings)]
    if section is not None and section.settings is not None:
        judged = tuple(margin.metric for margin in scored)
        clips.append(("certificate.margins", judged, "certificate.settings", section.settings))
    return [
        *(f"{where}: {_hint(name, figures)}" for where, name in wanted if name not in figures),
        *(f"certificate.margins: {_hint(name, config.metrics)}" for name in unscored),
        *(problem for margin in scored for problem in _margin_problems(margin)),
        *(problem for clip in clips for problem in _too_small(*clip)),
    ]


def computed_figures(metric_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return every figure a trial has if it computes these metrics."""
    drops = [f"{name}{DROP}" for name in metric_names if has_drop(find_metric(name))]
    excesses = [f"{name}{EXCESS}" for name in metric_names if has_excess(find_metric(name))]
    worst = [f"{name}{WORST}" for name in (*metric_names, *drops, *excesses)]
    return (*metric_names, *drops, *excesses, *worst, *MEASURED)


def worse(name: str) -> Callable[[Iterable[float]], float]:
    """Return what picks the worst of several values of a metric, or of its drop or excess: the smallest or the largest.

    Of a ratio or another metric with two bad sides that is the one on which damage usually lies.
    """
    return max if name.endswith((DROP, EXCESS)) or find_metric(name).direction == "minimize" else min


def _too_small(where: str, names: Iterable[str], whence: str, settings: RenderSettings) -> Iterator[str]:
    """Say of each metric that cannot judge frames as small as the settings render."""
    for name in names:
        smallest = find_metric(name).smallest_side
        if min(settings.height, settings.width) < smallest:
            yield (
                f"{where}: {name} needs frames of at least {smallest} pixels a side, but {whence} render "
                f"{settings.width}x{settings.height}; take {name} out or render larger frames"
            )


def _margin_problems(margin: Margin) -> Iterator[str]:
    spec = find_metric(margin.metric)
    if margin.loss is not None and not has_drop(spec):
        yield (
            f"certificate.margins: {margin.metric} compares with the float video, so its margin must be min, max or "
            f"both, but got a loss of {margin.loss:g}; give a bound"
        )
        return
    if spec.unit != FLAG_UNIT:
        yield from list(_bounds_that_float_breaks(margin, spec)) or _bounds_beyond_all_scores(margin, spec)
        return
    share = allowed_share(margin, spec)
    if share is None or not 0.0 < share < 1.0:
        side = "max" if spec.direction == "minimize" else "min"
        yield (
            f"certificate.margins: the margin of {margin.metric} must be a loss or a {side} that allows a share of "
            f"flawed prompts between 0 and 1, but got {margin.in_words()}; no number of prompts shows that none ever "
            "fails, so give a share such as 0.1"
        )


def _bounds_that_float_breaks(margin: Margin, spec: MetricSpec) -> Iterator[str]:
    """Say of each bound whether it leaves the float clips themselves no room, as one on the wrong side does."""
    own = spec.of_itself
    if own is None:
        return
    if (margin.min is not None and margin.min >= own) or (margin.max is not None and margin.max <= own):
        side = {spec.range[0]: "a max above it", spec.range[1]: "a min below it"}.get(
            own, "a min below it, a max above"
        )
        yield (
            f"certificate.margins: the margin of {margin.metric} must leave room for the float clips themselves, which "
            f"score {own:g}, but got {margin.in_words()}; give {side}"
        )


def _bounds_beyond_all_scores(margin: Margin, spec: MetricSpec) -> Iterator[str]:
    """Say of a margin that every video keeps, or none does, that it states nothing."""
    low, high = spec.range
    is_vacuous = margin.loss is not None and margin.loss >= high - low
    if is_vacuous or any(not low < bound < high for bound in (margin.min, margin.max) if bound is not None):
        yield (
            f"certificate.margins: the margin of {margin.metric} must be one that some videos keep and others do not, "
            f"and scores lie from {low:g} to {high:g}, but got {margin.in_words()}; give one within these"
        )


def _hint(name: str, figures: tuple[str, ...]) -> str:
    base = name.removesuffix(WORST).removesuffix(DROP).removesuffix(EXCESS)
    if name not in figures and base in known_metrics():
        return f"{name!r} needs {base!r} in metrics; add it there"
    return f"must be one of {', '.join(figures)}, but got {name!r}{did_you_mean(name, figures)}"
