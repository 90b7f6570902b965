"""w8a8_dynamic: int8 weights; activations are quantized per token, symmetrically, with the range of each input."""

import torch
from torch import Tensor

from hyquant.config import DeployDtype
from hyquant.numerics.qparams import QParams
from hyquant.schemes import w8a16
from hyquant.schemes.base import Scheme, Spec
from hyquant.schemes.contract import LayerTensors


def build(
    weight: Tensor,
    bias: Tensor | None,
    input_qparams: QParams | None,
    deploy_dtype: DeployDtype,
    *,
    division_dtype: DeployDtype = "float32",
) -> LayerTensors:
    """Return weight, weight_scale, weight_offset and bias; calibration has no part in it (`input_qparams` is None)."""
    tensors = w8a16.build(weight, bias, input_qparams, deploy_dtype, division_dtype=division_dtype)
    return {**tensors, "weight_offset": torch.zeros_like(tensors["weight_scale"])}


def specs(rows: int, columns: int, num_steps: int) -> dict[str, Spec]:
    """Return dtype and shape of the tensors of N output and K input channels, however many steps there are."""
    return w8a16.specs(rows, columns, num_steps) | {"weight_offset": (torch.float32, (rows, 1))}


W8A8_DYNAMIC = Scheme(name="w8a8_dynamic", needs_range=False, is_per_step=False, build=build, specs=specs)
