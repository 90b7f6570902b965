"""From a quantized denoiser's tensors to the engine's, and back: names, dtypes and the description.

The engine is MindIE-SD: a layer's tensors are named `LAYER.KIND`, and a description names the algorithm of every
tensor. Where a layer is smoothed, its multiplier is `LAYER.div.mul_scale` and all its other tensors are
`LAYER.linear.KIND`. Scales are float32; only for float16 deployment `deq_scale` is int64 with the float32's bits in
the low half, as the operator wants it. Weights that stay in float keep the model's dtype. Quantized attention belongs
to a block M: int8 has `M.fa_q.scale`, `M.fa_q.offset` and so on, float8 has `M.q_rot` and `M.k_rot`, and an entry
`M.quant_type` of the description that names no tensor. Sources: mindiesd 3.1 (`quantize`), torch_npu
`npu_quant_matmul`; for int8 attention msModelSlim 26.1.0, whose exports have one scale per token, not per head.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hyquant.attention.int8 import PARTS
from hyquant.config import FA3Fp8
from hyquant.errors import ExportError
from hyquant.export.manifest import Layout
from hyquant.models.names import LayerGroup, to_diffusers, to_original
from hyquant.plan import AttentionPlan, LayerPlan, QuantPlan

ALGORITHMS: Mapping[str, str] = {
    "w8a8_static": "W8A8",
    "w8a8_dynamic": "W8A8_DYNAMIC",
    "w8a8_timestep": "W8A8_TIMESTEP",
    "w8a16": "W8A16",
    "w4a16": "W4A16",
    "w4a8": "W4A8",
    "w4a4_dynamic": "W4A4_DYNAMIC",
}
"""The engine's name of each scheme."""

ATTENTION_ALGORITHMS: Mapping[str, str] = {"fa3_int8": "FAQuant", "fp8_dynamic": "FP8_DYNAMIC"}
"""The engine's name of each attention scheme."""

FLOAT = "FLOAT"
TYPE_KEY = "model_quant_type"
ATTENTION_TYPE_KEY = "fa_quant_type"

_INT8_KINDS = tuple(f"{part}.{kind}" for part in PARTS for kind in ("scale", "offset"))
_ATTENTION_KINDS = (*_INT8_KINDS, "q_rot", "k_rot")
_SMOOTH_KIND = "mul_scale"
_SMOOTH_SUFFIX = ".div.mul_scale"


def model_quant_type(plan: QuantPlan) -> str:
    """Return the engine's name of what the plan does.

    Raises:
        ExportError: If the plan quantizes nothing, or int8 attention alone: there is no such export.
    """
    if plan.quantized_attentions and not plan.quantized:
        if isinstance(plan.config.attention, FA3Fp8):
            return ATTENTION_ALGORITHMS["fp8_dynamic"]
        raise ExportError(
            "an export with int8 attention must quantize a Linear too, because engines know no type for attention "
            "alone, but this plan quantizes none; add w8a8_dynamic"
        )
    if plan.config.linear is None or not plan.quantized:
        raise ExportError(
            "an export must quantize a layer, but this plan quantizes none; ship the float weights instead"
        )
    return ALGORITHMS[plan.config.linear.kind]


def layer_names(plan: QuantPlan, layout: Layout) -> dict[str, str]:
    """Return layer -> scheme of the quantized layers, with the layer names of a layout."""
    return {
        name: str(layer.scheme)
        for layer in plan.quantized
        for name in ((layer.name,) if layout == "original" else layer.modules)
    }


def is_renamed(plan: QuantPlan, layout: Layout) -> bool:
    """Return whether an export bears other names than the denoiser: original ones of a diffusers HunyuanVideo."""
    return layout == "original" and has_diffusers_names(plan.layers)


def has_diffusers_names(layers: Iterable[LayerPlan | LayerGroup]) -> bool:
    """Return whether layers are of HunyuanVideo in diffusers' layout; in every other one, modules name the layers."""
    return any(layer.modules != (layer.name,) for layer in layers)


def attention_names(plan: QuantPlan, layout: Layout) -> dict[str, AttentionPlan]:
    """Return block -> plan of the quantized attentions, with the block names of a layout."""
    return {block.name if layout == "original" else block.module: block for block in plan.quantized_attentions}


def split_attentions(
    tensors: Mapping[str, Tensor], plan: QuantPlan, layout: Layout
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return the tensors of an export without those of attentions, and those by module path of their block."""
    attentions: dict[str, dict[str, Tensor]] = {block.module: {} for block in plan.quantized_attentions}
    others = dict(tensors)
    for name, block in attention_names(plan, layout).items():
        for kind in _ATTENTION_KINDS:
            if f"{name}.{kind}" in others:
                attentions[block.module][kind] = others.pop(f"{name}.{kind}")
    return others, attentions


def deployed(
    state: Mapping[str, Tensor], layers: Sequence[str], *, renamed: bool, deploy_dtype: str
) -> dict[str, Tensor]:
    """Return a denoiser's whole state under the engine's names and with its dtypes.

    Args:
        state: `MODULE.KIND` -> tensor, for every quantized and float tensor, in the denoiser's names.
        layers: Quantized layers, in the names of the export.
        renamed: Whether diffusers' names become original ones; else the denoiser's names stay.
        deploy_dtype: What the engine computes in; "float16" makes `deq_scale` int64.
    """
    named = to_original(state) if renamed else dict(state)
    smoothed = {layer for layer in layers if f"{layer}.{_SMOOTH_KIND}" in named}
    return {wrapped(key, smoothed): stored(key, tensor, deploy_dtype) for key, tensor in named.items()}


def stored(key: str, tensor: Tensor, deploy_dtype: str) -> Tensor:
    """Return a tensor `LAYER.KIND` in the dtype in which it is kept; elementwise, so of some rows too."""
    return _to_bits(tensor) if stored_dtype(key, tensor.dtype, deploy_dtype) != tensor.dtype else tensor


def stored_dtype(key: str, dtype: torch.dtype, deploy_dtype: str) -> torch.dtype:
    """Return the dtype in which `deployed` keeps a tensor `LAYER.KIND`, or KIND, of some dtype."""
    return torch.int64 if key.rpartition(".")[2] == "deq_scale" and deploy_dtype == "float16" else dtype


def undeployed(tensors: Mapping[str, Tensor], *, renamed: bool) -> dict[str, Tensor]:
    """Undo `deployed`: return `MODULE.KIND` -> tensor in the denoiser's names."""
    smoothed = {key.removesuffix(_SMOOTH_SUFFIX) for key in tensors if key.endswith(_SMOOTH_SUFFIX)}
    named = {
        _unwrapped(key, smoothed): _from_bits(tensor) if key.endswith(".deq_scale") else tensor
        for key, tensor in tensors.items()
    }
    return to_diffusers(named) if renamed else named


def describe(
    keys: Sequence[str],
    schemes: Mapping[str, str],
    quant_type: str,
    attentions: Mapping[str, AttentionPlan] | None = None,
) -> dict[str, str]:
    """Return the description: the types of the model and of quantized attentions, and of every tensor its algorithm.

    Args:
        keys: Names of all tensors.
        schemes: Scheme by quantized layer; its bias and multiplier and the tensors of others are FLOAT.
        quant_type: The type of the model.
        attentions: Quantized attentions by block, from `attention_names`.
    """
    head, kinds = {TYPE_KEY: quant_type}, dict[str, str]()
    for name, block in (attentions or {}).items():
        algorithm = ATTENTION_ALGORITHMS[str(block.scheme)]
        if block.scheme == "fa3_int8":
            head[ATTENTION_TYPE_KEY] = algorithm
            kinds |= {f"{name}.{kind}": algorithm for kind in _INT8_KINDS}
        else:
            kinds[f"{name}.quant_type"] = algorithm
    tensors = {key: kinds.get(key) or _algorithm(key, schemes) for key in keys}
    types = {key: algorithm for key, algorithm in kinds.items() if key.endswith(".quant_type")}
    return head | dict(sorted((tensors | types).items()))


def _algorithm(key: str, schemes: Mapping[str, str]) -> str:
    if key.endswith((_SMOOTH_SUFFIX, ".bias")):
        return FLOAT
    layer = key.rpartition(".")[0]
    scheme = schemes.get(layer) or schemes.get(layer.removesuffix(".linear"))
    return ALGORITHMS[scheme] if scheme else FLOAT


def wrapped(key: str, smoothed: Collection[str]) -> str:
    """Return the name that the export has for `LAYER.KIND`, given the layers that have a multiplier."""
    layer, _, kind = key.rpartition(".")
    if layer not in smoothed:
        return key
    return f"{layer}{_SMOOTH_SUFFIX}" if kind == _SMOOTH_KIND else f"{layer}.linear.{kind}"


def _unwrapped(key: str, smoothed: set[str]) -> str:
    owner, _, kind = key.rpartition(".")
    for suffix in (".div", ".linear"):
        layer = owner.removesuffix(suffix)
        if layer != owner and layer in smoothed:
            return f"{layer}.{kind}"
    return key


def _to_bits(scale: Tensor) -> Tensor:
    """Return positive float32 scales as int64 with the same bits in the low half."""
    return scale.contiguous().view(torch.int32).to(torch.int64)


def _from_bits(scale: Tensor) -> Tensor:
    return scale.to(torch.int32).view(torch.float32) if scale.dtype == torch.int64 else scale
