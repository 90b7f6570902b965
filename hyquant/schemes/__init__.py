"""Number formats of Linears, by the `kind` that `QuantConfig.linear` names."""

from hyquant.schemes.base import Scheme
from hyquant.schemes.w8a8_dynamic import W8A8_DYNAMIC
from hyquant.schemes.w8a8_static import W8A8_STATIC
from hyquant.schemes.w8a8_timestep import W8A8_TIMESTEP
from hyquant.schemes.w8a16 import W8A16

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (W8A8_STATIC, W8A8_DYNAMIC, W8A8_TIMESTEP, W8A16)}

__all__ = ["SCHEMES", "Scheme"]
