"""Outlier suppression by the `kind` that `QuantConfig.smoothing` names."""

from hyquant.smoothing import m3, m4, m6
from hyquant.smoothing.base import SmoothingRule

SMOOTHINGS: dict[str, SmoothingRule] = {
    "m3": SmoothingRule(is_searched=lambda config: True, search=m3.search),
    "m4": SmoothingRule(is_searched=lambda config: False, choose_scale=m4.choose_scale),
    "m6": SmoothingRule(is_searched=lambda config: config.is_searched, choose_scale=m6.choose_scale, search=m6.search),
}
