"""w4a4_dynamic: int4 weights, one scale per output channel; activations are int4 per token, with each input's range.

Input codes lie in [-7, 7] (`npu_dynamic_quant`: rowmax / 7). Eight of them share an int32, so K is a multiple of 8.
"""

from hyquant.schemes.base import Scheme
from hyquant.schemes.int4 import build_int4, int4_specs

W4A4_DYNAMIC = Scheme(
    name="w4a4_dynamic",
    needs_range=False,
    is_per_step=False,
    build=build_int4,
    specs=int4_specs,
    weight_bits=4,
    input_bits=4,
    input_multiple=8,
)
