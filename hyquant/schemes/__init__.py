"""Number formats of Linears, by the `kind` that `QuantConfig.linear` names."""

from hyquant.schemes.base import Scheme
from hyquant.schemes.w8a8_dynamic import W8A8_DYNAMIC
from hyquant.schemes.w8a8_static import W8A8_STATIC
from hyquant.schemes.w8a8_timestep import W8A8_TIMESTEP

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (W8A8_STATIC, W8A8_DYNAMIC, W8A8_TIMESTEP)}

__all__ = ["SCHEMES", "Scheme"]
