"""From a session's configs to a `QuantConfig`."""

from collections.abc import Sequence

from torch import nn

from hyquant.config import (
    M3,
    M4,
    M6,
    FA3Int8,
    LinearScheme,
    QuantConfig,
    Smoothing,
    W8A8Dynamic,
    W8A8Static,
    W8A8Timestep,
)
from hyquant.layers import first_match
from hyquant.models.names import LayerGroup
from hyquant.session.configs import SessionConfig
from hyquant.session.layers import last_linear, selection_without
from hyquant.session.processors import (
    M3ProcessorConfig,
    M4ProcessorConfig,
    Quantizer,
    W8A8DynamicProcessorConfig,
    W8A8ProcessorConfig,
)

PEER_SMOOTHED = "*double_blocks.*attn_qkv"
"""The layers of HunyuanVideo that msModelSlim smooths."""


def quant_config(session: SessionConfig, model: nn.Module, groups: Sequence[LayerGroup]) -> QuantConfig:
    """Return what a session does to a model.

    Args:
        session: The session.
        model: The denoiser.
        groups: Its layer groups.

    Raises:
        LayerMatchError: If `disable_names` has a name that is no Linear of the model.
        ConfigError: If part of a fused layer is to be disabled.
    """
    names = list(session.quantizer.disable_names)
    if session.disable_last_linear:
        names.append(last_linear(model, groups))
    return QuantConfig(
        linear=_linear(session.quantizer),
        smoothing=_smoothing(session, groups),
        attention=FA3Int8() if session.has_attention else None,
        calibration=session.calibration,
        layers=selection_without(groups, names, model=type(model).__name__),
        deploy_dtype=session.deploy_dtype,
        weight_division="deploy_dtype" if _follows_peer(session, model) else "float32",
    )


def _follows_peer(session: SessionConfig, model: nn.Module) -> bool:
    """Tell whether a session asks for msModelSlim's numbers, which come of arithmetic in the model's dtype."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return session.calibration == "sequential" and session.deploy_dtype == dtype and dtype != "float32"


def _linear(quantizer: Quantizer) -> LinearScheme:
    if isinstance(quantizer, W8A8ProcessorConfig):
        return W8A8Static(act_method=quantizer.cfg.act_method)
    if isinstance(quantizer, W8A8DynamicProcessorConfig):
        return W8A8Dynamic()
    return W8A8Timestep(
        act_method=quantizer.cfg.act_method, timestep_sep=quantizer.timestep_sep, rows=quantizer.cfg.rows
    )


def _smoothing(session: SessionConfig, groups: Sequence[LayerGroup]) -> Smoothing | None:
    smoother = session.smoother
    if smoother is None:
        return None
    layers = smoother.layers
    if layers is None:
        is_hunyuan = any(first_match(group.name, (PEER_SMOOTHED,)) for group in groups)
        layers = (PEER_SMOOTHED,) if is_hunyuan else ("*",)
    if isinstance(smoother, M3ProcessorConfig):
        records = smoother.records or ("first" if session.calibration == "sequential" else "all")
        return M3(layers=layers, records=records)
    if isinstance(smoother, M4ProcessorConfig):
        return M4(layers=layers)
    return M6(layers=layers, alpha=smoother.cfg.alpha, beta=smoother.cfg.beta)
