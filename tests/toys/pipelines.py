"""Two toy text-to-video pipelines with a denoising loop in the original's way, for scripts of the session API.

Each is a loop over a small random HunyuanVideo, in Tencent's layout or in diffusers', whose start depends on the prompt
and on the rank. The loops call the denoiser by position and set the step as the document of msModelSlim asks.
"""

import atexit
import os
import sys
import zlib
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hyquant import TimestepManager
from hyquant.models.sampling import draw_noise
from hyquant.models.tiny import LATENT_CHANNELS, hashed_embedding, random_denoiser
from tests.toys.original_dit import ToySize, random_toy, toy_inputs

ORIGINAL_ARGS = ("x", "t", "text_states", "text_mask", "text_states_2", "freqs_cos", "freqs_sin", "guidance")


class ToyPipeline:
    """Render by Euler steps; `transformer` is the denoiser."""

    def __init__(self, layout: str, rank: int) -> None:
        self.layout, self.rank = layout, rank
        self.transformer: nn.Module = (
            random_toy(0, ToySize(num_refiner_layers=1)) if layout == "original" else random_denoiser(0, torch.float32)
        )

    @torch.no_grad()
    def __call__(self, prompt: str, num_inference_steps: int) -> Tensor:
        """Return latents."""
        args = self.inputs(zlib.crc32(prompt.encode()) + self.rank, prompt)
        line = torch.linspace(1.0, 0.0, num_inference_steps + 1).tolist()
        for step_id, (sigma, following) in enumerate(pairwise(line)):
            TimestepManager.set_timestep_idx(step_id)
            args[1] = torch.full((1,), 1000 * sigma)
            args[0] = args[0] + (following - sigma) * first_tensor(self.transformer(*args))
        return args[0]

    def inputs(self, seed: int, prompt: str) -> list[Tensor]:
        """Return the positional arguments of a first call."""
        if self.layout == "original":
            named = toy_inputs(ToySize(num_refiner_layers=1), seed=seed)
            return [named[name] for name in ORIGINAL_ARGS]
        text = hashed_embedding(prompt)
        return [
            draw_noise([seed], (LATENT_CHANNELS, 2, 4, 6)),
            torch.full((1,), 1000.0),
            text.tokens[None],
            torch.ones(1, len(text.tokens)),
            text.pooled[None],
            torch.full((1,), 6000.0),
        ]


def first_tensor(output: object) -> Tensor:
    """Return the only tensor of a denoiser's output."""
    (tensor,) = output.values() if isinstance(output, dict) else output.to_tuple()  # type: ignore[attr-defined]
    return tensor


def load_pipeline(layout: str) -> ToyPipeline:
    """Return a pipeline, its weights the same in every process; under torchrun's environment join the ranks first.

    A rank that went well waits for the others and ends at once: now and then one of gloo's threads aborts a process
    that winds it down.
    """
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(_leave)
    return ToyPipeline(layout, dist.get_rank() if dist.is_initialized() else 0)


def _leave() -> None:
    if hasattr(sys, "last_value"):
        return  # the script failed, and its exit code says so
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
