"""w4a16: int4 weights, one scale per output channel and group of input channels; inputs stay in float."""

from functools import partial

from hyquant.schemes.base import Scheme
from hyquant.schemes.int4 import build_int4, int4_specs


def in_groups(group_size: int) -> Scheme:
    """Return the scheme with a scale for every `group_size` input channels; 0 for one per output channel."""
    return Scheme(
        name="w4a16",
        needs_range=False,
        is_per_step=False,
        build=partial(build_int4, group_size=group_size),
        specs=partial(int4_specs, group_size=group_size),
        weight_bits=4,
        input_bits=None,
        input_multiple=max(1, group_size),
    )


W4A16 = in_groups(0)
