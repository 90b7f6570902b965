"""What must be known of activations before a plan can be carried out."""

from hyquant.config import M3, StoredRange
from hyquant.observers import OBSERVERS
from hyquant.plan import QuantPlan
from hyquant.schemes import SCHEMES
from hyquant.smoothing import SMOOTHINGS


def needs_stats(plan: QuantPlan) -> bool:
    """Return whether a plan needs calibration statistics at all."""
    return bool(plan.smoothed) or any(SCHEMES[str(layer.scheme)].needs_range for layer in plan.quantized)


def needs_histograms(plan: QuantPlan) -> bool:
    """Return whether ranges need to know how often values occur (`observe(..., histograms=True)`)."""
    linear = plan.config.linear
    if not isinstance(linear, StoredRange) or not plan.quantized:
        return False
    return OBSERVERS[linear.act_method].needs_histogram or linear.percentile is not None


def needs_smoothed_stats(plan: QuantPlan) -> bool:
    """Return whether ranges of smoothed layers need statistics of the smoothed input (`observe(..., mul=...)`)."""
    linear = plan.config.linear
    if not isinstance(linear, StoredRange) or not plan.smoothed:
        return False
    return not OBSERVERS[linear.act_method].follows_multiplier or linear.percentile is not None


def needs_attention_stats(plan: QuantPlan) -> bool:
    """Return whether a plan needs statistics of q, k and v: int8 attention stores its scales."""
    return any(block.scheme == "fa3_int8" for block in plan.attentions)


def needs_search(plan: QuantPlan) -> bool:
    """Return whether smoothing scales must be searched first (`hyquant.smoothing.search.search_scales`)."""
    config = plan.config.smoothing
    return config is not None and bool(plan.smoothed) and SMOOTHINGS[config.kind].is_searched(config)


def searches_first_record(plan: QuantPlan) -> bool:
    """Return whether a search of smoothing scales looks at the first record of all ranks only."""
    config = plan.config.smoothing
    return needs_search(plan) and isinstance(config, M3) and config.records == "first"
