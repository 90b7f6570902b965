"""Outlier suppression by kind: a smoothing scale [C] from a config, the activation absmax and the weight absmax."""

from collections.abc import Callable

from torch import Tensor

from hyquant.config import Smoothing
from hyquant.smoothing import m4

ScaleRule = Callable[[Smoothing, Tensor, Tensor], Tensor]

SMOOTHINGS: dict[str, ScaleRule] = {"m4": m4.choose_scale}
