"""Everything `quantize_` takes from calibration records for one plan, made by all ranks together.

Statistics of the float model (of its attention too) and searched smoothing scales are shared by the trials of a study;
what depends on the plan's own quantization errors, or on its multipliers, is worked out for the plan alone.
"""

from collections.abc import Mapping

from torch import Tensor

from hyquant.calibration.calibrate import Calibrated
from hyquant.calibration.sequential import needs_float_stats, needs_sequential_stats
from hyquant.calibration.stats import Stats
from hyquant.distributed import merge_stats
from hyquant.plan import QuantPlan
from hyquant.quantize import needs_smoothed_stats, smoothing_scales
from search.attention import prepare_attention
from search.prepare import calibrate, calibrate_sequentially
from search.scales import prepare_scales
from search.stages import Stages
from search.workbench import Workbench, observe_smoothed_shard


def calibrate_for(bench: Workbench, plan: QuantPlan, stages: Stages) -> Calibrated:
    """Return what a plan takes from the calibration records. The denoiser must be in float. Collective.

    Raises:
        TrialFailed: On every rank, if one rank cannot calibrate.
    """
    is_sequential = needs_sequential_stats(plan)
    if needs_float_stats(plan):
        calibrate(bench, stages, plan)
    heads = prepare_attention(bench, plan, stages)
    scales = prepare_scales(bench, plan, stages)
    if is_sequential:
        if scales is None:
            scales = smoothing_scales(bench.model.denoiser, plan, bench.stats)
        stats, smoothed_stats = calibrate_sequentially(bench, plan, stages, scales=scales)
        return Calibrated(stats, smoothed_stats, scales, heads)
    return Calibrated(bench.stats, _smoothed_stats(bench, plan, stages, scales), scales, heads)


def _smoothed_stats(
    bench: Workbench, plan: QuantPlan, stages: Stages, scales: Mapping[str, Tensor] | None
) -> Stats | None:
    """Observe the records again where a range of smoothed inputs does not follow from the plain ones. Collective."""
    if not needs_smoothed_stats(plan):
        return None
    own = stages.run("calibrate", lambda: observe_smoothed_shard(bench, plan, scales=scales))
    with stages.timed("calibrate"):
        return merge_stats(own, bench.group)
