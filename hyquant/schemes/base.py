"""What a scheme is: how a float Linear becomes the tensors of a quantized one (`hyquant.schemes.contract`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias

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

Bits: TypeAlias = Literal[4, 8]

WEIGHT_CODES: Mapping[Bits, tuple[int, int]] = MappingProxyType({8: (-127, 127), 4: (-8, 7)})
"""Least and largest integer of a weight, by its bits; both are stored as int8."""


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
        weight_bits: Bits of a weight; see `WEIGHT_CODES`.
        input_bits: Bits of an activation; None if the inputs stay in float.
        input_multiple: What the number of input channels must be a multiple of.
    """

    name: str
    needs_range: bool
    is_per_step: bool
    build: BuildTensors
    specs: Callable[[int, int, int], Mapping[str, Spec]]
    weight_bits: Bits = 8
    input_bits: Bits | None = 8
    input_multiple: int = 1

    @property
    def is_weight_only(self) -> bool:
        """Say whether the inputs stay in float."""
        return self.input_bits is None
