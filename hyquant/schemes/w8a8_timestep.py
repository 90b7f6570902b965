"""w8a8_timestep: w8a8_dynamic before `timestep_sep`, then w8a8_static with one range per denoising step.

Row t of each table comes from the records of step t, alone or with those of all later steps.
"""

import torch
from torch import Tensor

from hyquant.config import DeployDtype
from hyquant.numerics.qparams import QParams
from hyquant.schemes.base import Scheme, Spec
from hyquant.schemes.contract import LayerTensors
from hyquant.schemes.weights import quantize_weight, static_constants, static_specs, weight_specs


def build(
    weight: Tensor,
    bias: Tensor | None,
    input_qparams: QParams | None,
    deploy_dtype: DeployDtype,
    *,
    division_dtype: DeployDtype = "float32",
) -> LayerTensors:
    """Return the tensors of w8a8_dynamic plus input_scale, input_offset [T, 1] and deq_scale, quant_bias [T, N]."""
    assert input_qparams is not None
    weight_q, weight_scale = quantize_weight(
        weight, deploy_dtype, bias=bias, input_scale=input_qparams.scale, division_dtype=division_dtype
    )
    deq_scale, quant_bias = static_constants(weight_q, weight_scale, bias, input_qparams, deploy_dtype)
    tensors = {
        "weight": weight_q,
        "weight_scale": weight_scale,
        "weight_offset": torch.zeros_like(weight_scale),
        "input_scale": input_qparams.scale,
        "input_offset": input_qparams.zero_point,
        "deq_scale": deq_scale,
        "quant_bias": quant_bias,
    }
    return tensors if bias is None else {**tensors, "bias": bias.float()}


def specs(rows: int, columns: int, num_steps: int) -> dict[str, Spec]:
    """Return dtype and shape of the tensors of N output and K input channels and T steps."""
    offset: dict[str, Spec] = {"weight_offset": (torch.float32, (rows, 1))}
    return weight_specs(rows, columns) | offset | static_specs(rows, (num_steps,))


W8A8_TIMESTEP = Scheme(name="w8a8_timestep", needs_range=True, is_per_step=True, build=build, specs=specs)
