"""w8a8_static: int8 weights; activations are quantized per tensor, asymmetrically, with one range for all steps."""

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
    """Return weight, input_scale [1], input_offset [1], deq_scale [N], quant_bias [N] and bias."""
    assert input_qparams is not None
    weight_q, weight_scale = quantize_weight(
        weight, deploy_dtype, bias=bias, input_scale=input_qparams.scale, division_dtype=division_dtype
    )
    deq_scale, quant_bias = static_constants(weight_q, weight_scale, bias, input_qparams, deploy_dtype)
    tensors = {
        "weight": weight_q,
        "input_scale": input_qparams.scale,
        "input_offset": input_qparams.zero_point,
        "deq_scale": deq_scale,
        "quant_bias": quant_bias,
    }
    return tensors if bias is None else {**tensors, "bias": bias.float()}


def specs(rows: int, columns: int, num_steps: int) -> dict[str, Spec]:
    """Return dtype and shape of the tensors of N output and K input channels, however many steps there are."""
    return {"weight": weight_specs(rows, columns)["weight"]} | static_specs(rows, ())


W8A8_STATIC = Scheme(name="w8a8_static", needs_range=True, is_per_step=False, build=build, specs=specs)
