"""w4a8: int4 weights, one scale per output channel; activations are int8 per token, with the range of each input."""

from hyquant.schemes.base import Scheme
from hyquant.schemes.int4 import build_int4, int4_specs

W4A8 = Scheme(name="w4a8", needs_range=False, is_per_step=False, build=build_int4, specs=int4_specs, weight_bits=4)
