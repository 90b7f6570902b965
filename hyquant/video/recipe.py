"""The quantization that the flags ask for: msModelSlim's recipes for HunyuanVideo as a `QuantConfig`.

Source: msModelSlim, example/multimodal_sd/HunYuanVideo (README and sample_video.py): layers, time-step 25 of 50,
exponents 0.8 and 0.2 of m6.
"""

from collections.abc import Mapping

from hyquant.config import (
    M3,
    M4,
    M6,
    DeployDtype,
    FA3Int8,
    LayerSelection,
    LinearScheme,
    QuantConfig,
    Smoothing,
    W8A8Dynamic,
    W8A8Static,
    W8A8Timestep,
)
from hyquant.session.translate import PEER_SMOOTHED
from hyquant.video.arguments import AntiMethod, Quantization

EXCLUDED = ("*img_mod*", "*modulation*", "*fc2*")
EXCLUDED_WITH_FA3 = ("*img_mod*", "*modulation*")

SMOOTHINGS: Mapping[AntiMethod, Smoothing] = {
    "m3": M3(layers=(PEER_SMOOTHED,)),
    "m4": M4(layers=(PEER_SMOOTHED,)),
    "m6": M6(layers=(PEER_SMOOTHED,), alpha=0.8, beta=0.2),
}


def quant_config(quantization: Quantization, *, num_steps: int, deploy_dtype: DeployDtype) -> QuantConfig:
    """Return what is done to the denoiser.

    Args:
        quantization: What the flags ask for.
        num_steps: Denoising steps; half of them stay dynamic under w8a8_timestep unless --timestep-sep says otherwise.
        deploy_dtype: Dtype of the engine that will run it.
    """
    has_fa3 = quantization.quant_type == "w8a8_dynamic_fa3"
    return QuantConfig(
        linear=_linear(quantization, num_steps),
        smoothing=None if quantization.anti_method is None else SMOOTHINGS[quantization.anti_method],
        attention=FA3Int8() if has_fa3 else None,
        layers=LayerSelection(exclude=EXCLUDED_WITH_FA3 if has_fa3 else EXCLUDED),
        deploy_dtype=deploy_dtype,
    )


def _linear(quantization: Quantization, num_steps: int) -> LinearScheme:
    act_method = quantization.act_method or "minmax"
    match quantization.quant_type:
        case "w8a8":
            return W8A8Static(act_method=act_method)
        case "w8a8_timestep":
            given = quantization.timestep_sep
            return W8A8Timestep(act_method=act_method, timestep_sep=num_steps // 2 if given is None else given)
        case _:
            return W8A8Dynamic()
