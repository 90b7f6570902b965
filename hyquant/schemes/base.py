"""What a scheme is: how a float Linear becomes the tensors of a quantized one (`hyquant.schemes.contract`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from hyquant.config import DeployDtype
from hyquant.numerics.qparams import QParams
from hyquant.schemes.contract import LayerTensors


class BuildTensors(Protocol):
    """Build the tensors of one Linear; `Scheme.build` says from what."""

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        input_qparams: QParams | None,
        deploy_dtype: DeployDtype,
        *,
        division_dtype: DeployDtype = "float32",
    ) -> LayerTensors:
        """Return the tensors by name."""
        ...


Spec: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


@dataclass(frozen=True)
class Scheme:
    """An entry of `SCHEMES`.

    Attributes:
        name: The scheme's kind in `QuantConfig`.
        needs_range: Whether activation ranges from calibration are part of it.
        is_per_step: Whether there is one range per denoising step.
        build: (weight [N, K] float32, bias [N] or None, input qparams or None, deployment dtype) -> tensors. The input
            qparams are [1], or [T, 1] if `is_per_step`; None unless `needs_range`. `division_dtype` is what weights
            over their scales are rounded to first.
        specs: (N output channels, K input channels, T denoising steps) -> dtype and shape by name of every tensor that
            `build` makes, but the bias.
    """

    name: str
    needs_range: bool
    is_per_step: bool
    build: BuildTensors
    specs: Callable[[int, int, int], Mapping[str, Spec]]
