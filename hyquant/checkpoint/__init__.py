"""From a float checkpoint to an export without a model in memory: read, quantized and written piece by piece.

`quantize_checkpoint` writes what `quantize_` and `save_quantized` would, byte for byte, in memory that does not grow
with the model, and goes on where it was killed.
"""

from hyquant.checkpoint.stream import StreamReport, quantize_checkpoint

__all__ = ["StreamReport", "quantize_checkpoint"]
