"""The rules that choose activation ranges, by act_method."""

from hyquant.config import ActMethod
from hyquant.observers.base import Observer
from hyquant.observers.histogram import HISTOGRAM
from hyquant.observers.mean_minmax import MEAN_MINMAX
from hyquant.observers.minmax import MINMAX
from hyquant.observers.mix import MIX

OBSERVERS: dict[ActMethod, Observer] = {
    "minmax": MINMAX,
    "mean_minmax": MEAN_MINMAX,
    "histogram": HISTOGRAM,
    "mix": MIX,
}

__all__ = ["OBSERVERS", "Observer"]
