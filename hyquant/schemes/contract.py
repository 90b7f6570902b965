"""The tensors of one quantized Linear: their names, shapes and dtypes, for modules, exports and name conversion.

Names and formulas are those of the algorithms of MindIE-SD's weight files: nothing is renamed on the way out.
N output channels, K input channels, T table rows (1-D row for `w8a8_static`, one row per step for `w8a8_timestep`).

    weight         [N, K] int8           all schemes; values in [-127, 127], of int4 ones in [-8, 7]
    weight_scale   [N, 1] float32        all but static; [N, G] for w4a16 in G groups of input channels
    weight_offset  [N, 1] float32 zeros  dynamic, timestep
    bias           [N] float32           if the Linear has one
    input_scale    [1] or [T, 1] float32     static, timestep
    input_offset   [1] or [T, 1] float32     static, timestep; integers in [-128, 127]
    deq_scale      [N] or [T, N] float32     static, timestep; input_scale * weight_scale
    quant_bias     [N] or [T, N] int32       static, timestep; round(bias / deq_scale - input_offset * sum_k weight)
    mul_scale      [K] float32           smoothed layers; the input is multiplied by it before it is quantized
"""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

LayerTensors = Mapping[str, Tensor]

ROW_DIMS: Mapping[str, int] = MappingProxyType(
    {"weight": 0, "bias": 0, "weight_scale": 0, "weight_offset": 0, "deq_scale": -1, "quant_bias": -1}
)
"""The dimension that counts output channels, by tensor name."""

INPUT_TENSORS = ("input_scale", "input_offset", "mul_scale")
"""Tensors that describe the input and are therefore equal for all members of a fused group."""
