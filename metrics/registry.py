"""The table of metrics, and how packages outside this tree add theirs.

Another distribution adds a metric through the entry point group "hyq.metrics": name = "package.module:SPEC", where SPEC
is a `MetricSpec` of that name. Its metrics are loaded when a name is not one of ours, or when all are listed.
"""

from importlib.metadata import EntryPoint, entry_points

from metrics.base import MetricSpec
from metrics.clip_prompt import CLIP_PROMPT
from metrics.clip_reference import CLIP_REFERENCE
from metrics.collapsed import COLLAPSED
from metrics.dino_distance import DINO_DISTANCE
from metrics.dists import DISTS
from metrics.errors import MetricError, did_you_mean
from metrics.exposure import EXPOSURE
from metrics.flicker import FLICKER
from metrics.lpips import LPIPS
from metrics.motion_energy_ratio import MOTION_ENERGY_RATIO
from metrics.ms_ssim import MS_SSIM
from metrics.psnr_db import PSNR_DB
from metrics.sharpness_db import SHARPNESS_DB
from metrics.ssim import SSIM
from metrics.warping_error import WARPING_ERROR

ENTRY_POINT_GROUP = "hyq.metrics"

METRICS: dict[str, MetricSpec] = {
    "clip_prompt": CLIP_PROMPT,
    "clip_reference": CLIP_REFERENCE,
    "psnr_db": PSNR_DB,
    "ssim": SSIM,
    "ms_ssim": MS_SSIM,
    "lpips": LPIPS,
    "dists": DISTS,
    "dino_distance": DINO_DISTANCE,
    "motion_energy_ratio": MOTION_ENERGY_RATIO,
    "flicker": FLICKER,
    "warping_error": WARPING_ERROR,
    "sharpness_db": SHARPNESS_DB,
    "exposure": EXPOSURE,
    "collapsed": COLLAPSED,
}


def known_metrics() -> dict[str, MetricSpec]:
    """Return all metrics by name: ours, then those of entry points.

    Raises:
        MetricError: If an entry point cannot be loaded, is no `MetricSpec`, or takes a name that is in use.
    """
    known = dict(METRICS)
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        spec = _load_spec(entry_point)
        if spec.name in known:
            raise MetricError(
                f"metric names must be unique, but {_label(entry_point)} adds {spec.name!r} again; rename it there"
            )
        known[spec.name] = spec
    return known


def find_metric(name: str) -> MetricSpec:
    """Return a metric by its name.

    Raises:
        MetricError: If there is none; the message lists the known ones and the closest match.
    """
    if name in METRICS:
        return METRICS[name]
    known = known_metrics()
    if name not in known:
        raise MetricError(f"a metric is one of {', '.join(known)}, but got {name!r}{did_you_mean(name, known)}")
    return known[name]


def _load_spec(entry_point: EntryPoint) -> MetricSpec:
    try:
        spec = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise MetricError(
            f"{_label(entry_point)} must be importable, but is not: {error}; reinstall or remove that package"
        ) from error
    if not isinstance(spec, MetricSpec) or spec.name != entry_point.name:
        raise MetricError(
            f"{_label(entry_point)} must be a MetricSpec of the same name, but is {spec!r}; correct that package"
        )
    return spec


def _label(entry_point: EntryPoint) -> str:
    return f"entry point {ENTRY_POINT_GROUP}: {entry_point.name} = {entry_point.value}"
