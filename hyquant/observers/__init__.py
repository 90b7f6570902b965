"""The rules that choose activation ranges, by act_method."""

from hyquant.config import ActMethod
from hyquant.observers.base import Observer
from hyquant.observers.mean_minmax import MEAN_MINMAX
from hyquant.observers.minmax import MINMAX

OBSERVERS: dict[ActMethod, Observer] = {"minmax": MINMAX, "mean_minmax": MEAN_MINMAX}

__all__ = ["OBSERVERS", "Observer"]
