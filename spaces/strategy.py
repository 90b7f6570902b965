"""Names of strategies: which smoothing, which linear scheme and which attention scheme a recipe combines.

    timestep  dynamic  static            a linear scheme alone: 8 bits of weights and activations
    w8a16  w4a16  w4a8  w4a4_dynamic     a linear scheme alone: bits of weights and of activations, 16 means float
    m3  m4  m6                           smoothing, then dynamic activations
    fa3  fp8                             dynamic activations, and quantized attention
    m4+timestep  m6+static  m4+fa3 ...   their combinations, always in the order smoothing, linear scheme, attention

`dynamic` is what a name means that names no linear scheme, so it is written only where it stands alone. Every
combination has one name: names are stored in studies, where two of them for one recipe would be two choices.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator

from hyquant.config import FA3Fp8, FA3Int8, QuantConfig
from hyquant.plan import SchemeName as LinearKind

SchemeName = Literal["timestep", "dynamic", "static", "w8a16", "w4a16", "w4a8", "w4a4_dynamic"]
SmoothingName = Literal["m3", "m4", "m6"]
AttentionName = Literal["fa3", "fp8"]

FLOAT = "float"
"""What the config that quantizes nothing is called."""

LINEAR_KINDS: Mapping[SchemeName, LinearKind] = MappingProxyType(
    {
        "timestep": "w8a8_timestep",
        "dynamic": "w8a8_dynamic",
        "static": "w8a8_static",
        "w8a16": "w8a16",
        "w4a16": "w4a16",
        "w4a8": "w4a8",
        "w4a4_dynamic": "w4a4_dynamic",
    }
)
"""The kind of `QuantConfig.linear` that each name of a linear scheme means."""
SCHEMES: tuple[SchemeName, ...] = tuple(LINEAR_KINDS)
SMOOTHINGS: tuple[SmoothingName, ...] = ("m3", "m4", "m6")
ATTENTIONS: tuple[AttentionName, ...] = ("fa3", "fp8")

_ATTENTION_KINDS: dict[str, AttentionName] = {
    FA3Int8.model_fields["kind"].default: "fa3",
    FA3Fp8.model_fields["kind"].default: "fp8",
}


class StrategyParts(NamedTuple):
    """What a strategy's name stands for."""

    smoothing: SmoothingName | None
    scheme: SchemeName
    attention: AttentionName | None

    @property
    def stores_ranges(self) -> bool:
        """Say whether activation ranges are stored, so that a method must find them."""
        return self.scheme in ("timestep", "static")


def parts_of(strategy: str) -> StrategyParts:
    """Return what a strategy's name stands for.

    Raises:
        ValueError: If a part is unknown or stands twice, or the name is not spelled the one way; the message gives it.
    """
    words = strategy.split("+")
    smoothing = next((name for name in SMOOTHINGS if name in words), None)
    scheme: SchemeName = next((name for name in SCHEMES if name in words), "dynamic")
    attention = next((name for name in ATTENTIONS if name in words), None)
    parts = StrategyParts(smoothing, scheme, attention)
    known = (*SMOOTHINGS, *SCHEMES, *ATTENTIONS)
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"the parts of a strategy are {', '.join(known)}, but got {unknown[0]!r} in {strategy!r}")
    if strategy != spelled(parts):
        raise ValueError(
            f"a strategy has at most one smoothing, one linear scheme and one attention scheme, in this order and "
            f"without 'dynamic' beside others, but got {strategy!r}; write {spelled(parts)!r}"
        )
    return parts


def spelled(parts: StrategyParts) -> str:
    """Return the name of a combination."""
    is_said = parts.scheme != "dynamic" or (parts.smoothing is None and parts.attention is None)
    words = (parts.smoothing, parts.scheme if is_said else None, parts.attention)
    return "+".join(word for word in words if word is not None)


def strategy_of(config: QuantConfig) -> str:
    """Return the strategy a config belongs to; "float" for the control, "fa3_only" if only attention is quantized."""
    attention = None if config.attention is None else _ATTENTION_KINDS[config.attention.kind]
    if config.linear is None:
        return FLOAT if attention is None else f"{attention}_only"
    names = {kind: name for name, kind in LINEAR_KINDS.items()}
    smoothing = None if config.smoothing is None else config.smoothing.kind
    return spelled(StrategyParts(smoothing, names[config.linear.kind], attention))


def _checked(strategy: str) -> str:
    parts_of(strategy)
    return strategy


Strategy = Annotated[str, AfterValidator(_checked)]
"""A strategy's name, checked."""
