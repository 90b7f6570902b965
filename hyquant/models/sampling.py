"""What every video model does around its denoiser: noise per seed, batches of prompts, clip sizes in latent units.

Noise belongs to a seed alone, not to a batch or a rank, so that a video does not depend on what it is rendered with.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hyquant.errors import ConfigError


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw one float32 Gaussian latent of `shape` per seed on the CPU: [len(seeds), *shape]."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def latent_size(
    height: int, width: int, num_frames: int, *, spatial_ratio: int, temporal_ratio: int
) -> tuple[int, int, int]:
    """Return latent frames, height and width of a clip.

    Raises:
        ConfigError: If the frames are not 1 + a multiple of `temporal_ratio`.
    """
    if (num_frames - 1) % temporal_ratio:
        near = max(1, num_frames - (num_frames - 1) % temporal_ratio)
        raise ConfigError(
            f"num_frames must be 1 + a multiple of {temporal_ratio}, but got {num_frames}; give {near}, for example"
        )
    return (num_frames - 1) // temporal_ratio + 1, height // spatial_ratio, width // spatial_ratio


def batches(prompts: Sequence[str], seeds: Sequence[int], size: int) -> Iterator[tuple[list[str], list[int]]]:
    """Yield prompts with their seeds in order, at most `size` at a time.

    Raises:
        ConfigError: If there is not exactly one seed per prompt.
    """
    if len(prompts) != len(seeds):
        raise ConfigError(f"render needs one seed per prompt, but got {len(prompts)} prompts and {len(seeds)} seeds")
    for start in range(0, len(prompts), size):
        yield list(prompts[start : start + size]), list(seeds[start : start + size])


def guidance_input(guidance_scale: float, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the embedded-guidance input [batch_size]: guidance_scale * 1000, computed in the denoiser's dtype."""
    return torch.tensor([guidance_scale] * batch_size, dtype=dtype, device=device) * 1000.0


def is_guidance_exact(guidance_scale: float, dtype: torch.dtype) -> bool:
    """Tell whether `dtype` holds guidance_scale * 1000 exactly: bfloat16 turns 6000 into 6016, but keeps 8000.

    The sinusoidal embedding of a changed value moves the whole output, for float and quantized denoisers alike, so
    scores against a reference of another dtype would measure this instead of quantization.
    """
    return guidance_input(guidance_scale, 1, dtype=dtype, device=torch.device("cpu")).item() == guidance_scale * 1000.0
