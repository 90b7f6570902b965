"""Number formats of Linears, by the `kind` that `QuantConfig.linear` names."""

from hyquant.config import LinearScheme
from hyquant.schemes.base import Scheme
from hyquant.schemes.w4a4_dynamic import W4A4_DYNAMIC
from hyquant.schemes.w4a8 import W4A8
from hyquant.schemes.w4a16 import W4A16, in_groups
from hyquant.schemes.w8a8_dynamic import W8A8_DYNAMIC
from hyquant.schemes.w8a8_static import W8A8_STATIC
from hyquant.schemes.w8a8_timestep import W8A8_TIMESTEP
from hyquant.schemes.w8a16 import W8A16

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (W8A8_STATIC, W8A8_DYNAMIC, W8A8_TIMESTEP, W8A16, W4A16, W4A8, W4A4_DYNAMIC)
}


def scheme_of(linear: LinearScheme) -> Scheme:
    """Return the scheme that a configuration asks for: an entry of `SCHEMES`, w4a16 in the groups it names."""
    return in_groups(linear.group_size) if linear.kind == "w4a16" else SCHEMES[linear.kind]


__all__ = ["SCHEMES", "Scheme", "scheme_of"]
