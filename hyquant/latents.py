"""Latents along the denoising loop, and how far a quantized loop's are from float's: the earliest sign of damage.

It costs nothing, as the latents are there anyway, and it sees damage before a decoder or a judge can hide it. At most
`MAX_ELEMENTS` of a latent's elements are kept, drawn once by a fixed seed: small latents whole, and of large ones a
sample from which a relative L2 error is known to about 0.3 %. That is 13 MB for 50 steps, whatever the clip.

    P prompts   N steps   E kept elements   B batch
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.linalg import vector_norm

MAX_ELEMENTS = 1 << 16


class LatentTrace:
    """Keeps the latents of every prompt after every step; call it with each step's batch, in the order of the loop.

    Args:
        num_steps: Steps of a loop; after so many calls the next batch begins.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._steps: list[Tensor] = []
        self._traces: list[Tensor] = []

    def __call__(self, latents: Tensor) -> None:
        """Keep one step's latents, [B, ...]."""
        rows_BE = latents.detach().flatten(1)
        kept = _kept_elements(rows_BE.shape[1])
        self._steps.append(rows_BE[:, kept.to(rows_BE.device)].float().cpu())
        if len(self._steps) == self._num_steps:
            self._traces += torch.stack(self._steps, dim=1).unbind(0)
            self._steps = []

    @property
    def traces(self) -> list[Tensor]:
        """Return the trace of every prompt whose loop has ended, [N, E] float32 each, in the order of rendering."""
        return self._traces


def relative_l2(trace: Tensor, reference: Tensor) -> Tensor:
    """Return ||x - f|| / ||f|| at every step, [N] float32.

    Args:
        trace: [N, E], x, a candidate's latents.
        reference: [N, E], f, the float model's from the same noise.
    """
    errors: Tensor = vector_norm(trace - reference, dim=1) / vector_norm(reference, dim=1)
    return errors


def mean_curve(errors: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the mean over prompts at every step, [N], of errors by prompt, [P][N]; empty if there are none."""
    return tuple(sum(step) / len(errors) for step in zip(*errors, strict=True))


@cache
def _kept_elements(count: int) -> Tensor:
    """Return which of a latent's elements are kept, sorted."""
    if count <= MAX_ELEMENTS:
        return torch.arange(count)
    is_kept = torch.zeros(count, dtype=torch.bool)
    is_kept[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MAX_ELEMENTS]] = True
    return is_kept.nonzero().flatten()
