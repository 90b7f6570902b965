"""Quantized attention ("fa3"): q, k and v of a block in 8 bits, by scheme name.

A scheme is what is put between the projections of a block and its attention (`hyquant.models.attentions`): it gets q, k
and v and returns what 8 bits keep of them, in float. The products themselves run in float then, which is simulated.
`fa3_int8` attends by integers, natively, where there is a kernel for it.
"""

from collections.abc import Mapping
from typing import TypeAlias

from hyquant.attention.fp8 import Fp8Attention
from hyquant.attention.int8 import Int8Attention

QuantAttention: TypeAlias = Int8Attention | Fp8Attention

ATTENTIONS: Mapping[str, type[Int8Attention] | type[Fp8Attention]] = {
    "fa3_int8": Int8Attention,
    "fp8_dynamic": Fp8Attention,
}
"""Scheme name -> class; each is rebuilt bit by bit from its own `tensors()`."""
