"""w8a16: int8 weights, one scale per output channel; inputs stay in float and nothing is calibrated."""

from torch import Tensor

from hyquant.config import DeployDtype
from hyquant.numerics.qparams import QParams
from hyquant.schemes.base import Scheme, Spec
from hyquant.schemes.contract import LayerTensors
from hyquant.schemes.weights import quantize_weight, weight_specs


def build(
    weight: Tensor,
    bias: Tensor | None,
    input_qparams: QParams | None,
    deploy_dtype: DeployDtype,
    *,
    division_dtype: DeployDtype = "float32",
) -> LayerTensors:
    """Return weight, weight_scale and bias; calibration has no part in it (`input_qparams` is None)."""
    assert input_qparams is None
    weight_q, weight_scale = quantize_weight(weight, deploy_dtype, division_dtype=division_dtype)
    tensors = {"weight": weight_q, "weight_scale": weight_scale}
    return tensors if bias is None else {**tensors, "bias": bias.float()}


def specs(rows: int, columns: int, num_steps: int) -> dict[str, Spec]:
    """Return dtype and shape of the tensors of N output and K input channels, however many steps there are."""
    return weight_specs(rows, columns)


W8A16 = Scheme(name="w8a16", needs_range=False, is_per_step=False, build=build, specs=specs, input_bits=None)
