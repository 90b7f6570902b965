"""What every video model does around its denoiser: noise per seed, batches of prompts, clip sizes in latent units.

Noise belongs to a seed alone, not to a batch or a rank, so that a video does not depend on what it is rendered with.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyquant.errors import ConfigError

TEMPORAL_RATIO = 4
"""Frames per latent frame, after the first one, of HunyuanVideo's autoencoder and of all models here."""

_ROUNDED = ("guidance", "timestep")


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw one float32 Gaussian latent of `shape` per seed on the CPU: [len(seeds), *shape]."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def require_whole_latents(num_frames: int, *, temporal_ratio: int = TEMPORAL_RATIO) -> None:
    """Check that a clip is the first frame and whole latent frames.

    Raises:
        ConfigError: If the frames are not 1 + a multiple of `temporal_ratio`.
    """
    if (num_frames - 1) % temporal_ratio:
        near = max(1, num_frames - (num_frames - 1) % temporal_ratio)
        raise ConfigError(
            f"num_frames must be 1 + a multiple of {temporal_ratio}, but got {num_frames}; give {near}, for example"
        )


def latent_size(
    height: int, width: int, num_frames: int, *, spatial_ratio: int, temporal_ratio: int
) -> tuple[int, int, int]:
    """Return latent frames, height and width of a clip.

    Raises:
        ConfigError: If the frames are not 1 + a multiple of `temporal_ratio`.
    """
    require_whole_latents(num_frames, temporal_ratio=temporal_ratio)
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


def round_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a denoiser's keyword inputs with guidance and timestep rounded to bfloat16, each in its own dtype."""
    return {
        name: value.to(torch.bfloat16).to(value.dtype) if name in _ROUNDED and value is not None else value
        for name, value in inputs.items()
    }


def nearest_exact_guidance(guidance_scale: float, dtype: torch.dtype) -> float:
    """Return the guidance scale next to this one, the larger of two, that `dtype` holds together with its thousandfold.

    1000 is 125 times 8 and takes 7 bits, so of bfloat16's 8 only powers of two are left: 8.0 for 6.0.

    Raises:
        ConfigError: If none is among the 512 neighbours, or the dtype has not 16 bits.
    """
    if dtype.itemsize != 2:
        raise ConfigError(f"guidance is looked for among values of 16 bits, but got {dtype}; every guidance fits there")
    at = int(torch.tensor(guidance_scale, dtype=dtype).view(torch.int16))
    near = torch.arange(at - 256, at + 257, dtype=torch.int16).view(dtype)
    exact = near[(near * 1000.0).double() == near.double() * 1000.0].tolist()
    if not exact:
        raise ConfigError(f"no guidance near {guidance_scale:g} is exact in {dtype}; give another one")
    return float(min(exact, key=lambda value: (abs(value - guidance_scale), -value)))


def is_guidance_exact(guidance_scale: float, dtype: torch.dtype) -> bool:
    """Tell whether `dtype` holds guidance_scale * 1000 exactly: bfloat16 turns 6000 into 6016, but keeps 8000.

    The sinusoidal embedding of a changed value moves the whole output, for float and quantized denoisers alike, so
    scores against a reference of another dtype would measure this instead of quantization. Wider dtypes round in the
    last of 24 bits at most, which moves nothing.
    """
    if dtype.itemsize > 2:
        return True
    return guidance_input(guidance_scale, 1, dtype=dtype, device=torch.device("cpu")).item() == guidance_scale * 1000.0
