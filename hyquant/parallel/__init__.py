"""One video on several ranks: sequence parallelism of the denoiser, and a decoder that shares out its tiles.

`parallelize_` has every rank work on a strip of the video's tokens and return the whole result, equal to that of one
rank up to the order of float sums; `parallelize_vae_` has every rank decode some tiles, equal bit by bit. The formulas
are in `docs/theory.md`, section 16.
"""

from hyquant.parallel.decode import parallelize_vae_, unparallelize_vae_
from hyquant.parallel.sequence import parallelize_, unparallelize_

__all__ = ["parallelize_", "parallelize_vae_", "unparallelize_", "unparallelize_vae_"]
