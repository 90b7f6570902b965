"""A video model small enough for tests: a HunyuanVideo transformer with seeded random weights, and little around it.

Prompts become embeddings by hashing, the sampler is a plain Euler loop over the straight flow path, and pixels are a
fixed linear map of latents. Videos mean nothing, but they depend on prompt, seed, settings and every weight, a step
takes milliseconds, and the denoiser is of the class that real weights use, so its layers have their usual names.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hyquant.clock import StepClock, attach_clock
from hyquant.errors import ConfigError
from hyquant.models.base import DeploymentShape, OnLatents, Record, RecordSink, RenderSettings
from hyquant.models.embedding import TextEmbedding, pad_together
from hyquant.models.fingerprint import denoiser_digest
from hyquant.models.names import LayerGroup, layer_groups
from hyquant.models.sampling import TEMPORAL_RATIO, batches, draw_noise, guidance_input, latent_size, round_inputs

SPATIAL_RATIO = 4
LATENT_CHANNELS = 4
TEXT_WIDTH = 24
POOLED_WIDTH = 16

_UNIT_GAIN = 3**0.5
"""From torch's default of variance 1 / (3 fan_in) to 1 / fan_in: else blocks hardly change what passes through them."""


class TinyVideoModel:
    """The `VideoModel` protocol over a random transformer of about 0.2 M weights; see the module's docstring.

    Args:
        seed: Seed of the weights.
        device: Where the denoiser lives.
        dtype: Dtype of its weights.
    """

    kind = "tiny"

    def __init__(
        self,
        seed: int = 0,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name = f"tiny-{seed}"
        self.source = str(seed)
        self.device = torch.device(device)
        self.dtype = dtype
        self.denoiser: nn.Module = random_denoiser(seed, dtype).to(self.device)
        self.clock = StepClock()
        self._step_index: int | None = None
        self._fingerprint = f"{denoiser_digest(self.denoiser)}-tiny"
        self._groups = layer_groups(self.denoiser)
        attach_clock(self.denoiser, self.clock, lambda: self._step_index)

    def groups(self) -> tuple[LayerGroup, ...]:
        """Return every original Linear of the denoiser as a group of module paths."""
        return self._groups

    def fingerprint(self) -> str:
        """Return the digest of the weights as they were built."""
        return self._fingerprint

    def embed(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Return hash-based embeddings, one token per word."""
        return [hashed_embedding(prompt) for prompt in prompts]

    def render(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: RenderSettings,
        *,
        on_step: Callable[[], None] | None = None,
        on_latents: OnLatents | None = None,
    ) -> list[Tensor]:
        """Render one video per prompt: float32 [T, C, H, W] in [0, 1]."""
        videos: list[Tensor] = []
        for batch_prompts, batch_seeds in batches(prompts, seeds, settings.batch_size):
            latents = self._denoise(batch_prompts, batch_seeds, settings, on_step=on_step, on_latents=on_latents)
            videos.extend(decode(latents).cpu())
        return videos

    def capture(self, prompts: Sequence[str], seeds: Sequence[int], settings: RenderSettings, sink: RecordSink) -> None:
        """Hand the denoiser's inputs at every step to `sink`, one prompt at a time."""
        for prompt_index, (prompt, seed) in enumerate(batches(prompts, seeds, 1)):

            def keep(step_index: int, inputs: dict[str, Tensor], prompt_index: int = prompt_index) -> None:
                copies = {name: tensor.to("cpu", copy=True) for name, tensor in inputs.items()}
                sink(Record(step_index, prompt_index, copies))

            self._denoise(prompt, seed, settings, on_call=keep)

    def deployment_inputs(self, shape: DeploymentShape, *, seed: int = 0) -> dict[str, Tensor]:
        """Return keyword inputs of one denoiser call at the deployment shape."""
        text = [hashed_embedding("eight words stand for a prompt of tests")] * shape.batch_size
        latents = draw_noise(range(seed, seed + shape.batch_size), _latent_shape(shape)).to(self.device)
        return self._inputs(latents, 500.0, text, guidance_scale=6.0)

    @torch.no_grad()
    def _denoise(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: RenderSettings,
        *,
        on_step: Callable[[], None] | None = None,
        on_latents: OnLatents | None = None,
        on_call: Callable[[int, dict[str, Tensor]], None] | None = None,
    ) -> Tensor:
        """Integrate dx/dsigma = v from noise (sigma 1) to latents (sigma 0) with Euler steps."""
        text = self.embed(prompts)
        latents = draw_noise(seeds, _latent_shape(settings)).to(self.device)
        sigmas = torch.linspace(1.0, 0.0, settings.num_steps + 1).tolist()
        self.clock.num_steps = settings.num_steps
        for step_index, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
            inputs = self._inputs(latents, 1000.0 * sigma, text, guidance_scale=settings.guidance_scale)
            inputs = round_inputs(inputs) if settings.round_inputs else inputs
            if on_call is not None:
                on_call(step_index, inputs)
            velocity = self._call_at(step_index, inputs)
            latents = latents + (next_sigma - sigma) * velocity.float()
            if on_latents is not None:
                on_latents(latents)
            if on_step is not None:
                on_step()
        return latents

    def _call_at(self, step_index: int, inputs: dict[str, Tensor]) -> Tensor:
        self._step_index = step_index
        try:
            (velocity,) = self.denoiser(**inputs, return_dict=False)
        finally:
            self._step_index = None
        assert isinstance(velocity, Tensor)
        return velocity

    def _inputs(
        self, latents: Tensor, timestep: float, text: Sequence[TextEmbedding], *, guidance_scale: float
    ) -> dict[str, Tensor]:
        size = latents.shape[0]
        tokens, pooled, mask = pad_together(text)
        return {
            "hidden_states": latents.to(self.dtype),
            "timestep": torch.full((size,), timestep, device=self.device),
            "encoder_hidden_states": tokens.to(self.device, self.dtype),
            "encoder_attention_mask": mask.to(self.device, self.dtype),
            "pooled_projections": pooled.to(self.device, self.dtype),
            "guidance": guidance_input(guidance_scale, size, dtype=self.dtype, device=self.device),
        }


def load_tiny(source: str, *, device: torch.device, dtype: torch.dtype) -> TinyVideoModel:
    """Build the tiny model; `source` is the seed of its weights.

    Raises:
        ConfigError: If `source` is not a number.
    """
    return TinyVideoModel(seed_of(source), device=device, dtype=dtype)


def seed_of(source: str) -> int:
    """Return the seed that a source names.

    Raises:
        ConfigError: If it is no number below 2^63.
    """
    if not source.isdecimal() or len(source) > 19 or int(source) >= 1 << 63:
        raise ConfigError(
            f"the source of a tiny model is the seed of its weights, 0 to 2^63 - 1, but got {source!r}; give 0, for "
            "example"
        )
    return int(source)


def random_denoiser(seed: int, dtype: torch.dtype) -> nn.Module:
    """Build a transformer of 2 double and 2 single blocks, 2 heads of 16, with weights drawn from `seed`."""
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser: nn.Module = HunyuanVideoTransformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            text_embed_dim=TEXT_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
            rope_axes_dim=(4, 6, 6),
        )
    for module in denoiser.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= _UNIT_GAIN
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.to(dtype)
    denoiser.eval().requires_grad_(False)
    return denoiser


def hashed_embedding(prompt: str) -> TextEmbedding:
    """Return an embedding of one Gaussian token per word; equal words give equal tokens."""
    words = prompt.split() or [""]
    return TextEmbedding(
        tokens=torch.stack([_hashed_noise(word, TEXT_WIDTH) for word in words]),
        pooled=_hashed_noise(prompt, POOLED_WIDTH),
    )


def decode(latents: Tensor) -> Tensor:
    """Map [B, 4, t, h, w] latents to [B, T, 3, H, W] pixels in [0, 1]: a fixed colour mix, then nearest upsampling."""
    mix_34 = torch.tensor([[1.0, 0.5, 0.0, 0.2], [0.0, 1.0, 0.5, -0.2], [0.5, 0.0, 1.0, 0.2]], device=latents.device)
    colours = torch.einsum("rc,bcthw->btrhw", mix_34, latents.float())
    frames = torch.cat([colours[:, :1], colours[:, 1:].repeat_interleave(TEMPORAL_RATIO, dim=1)], dim=1)
    pixels = frames.repeat_interleave(SPATIAL_RATIO, dim=3).repeat_interleave(SPATIAL_RATIO, dim=4)
    return (0.5 + 0.2 * pixels).clamp(0.0, 1.0)


def _hashed_noise(text: str, width: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.randn(width, generator=torch.Generator("cpu").manual_seed(seed))


def _latent_shape(clip: RenderSettings | DeploymentShape) -> tuple[int, ...]:
    size = latent_size(
        clip.height, clip.width, clip.num_frames, spatial_ratio=SPATIAL_RATIO, temporal_ratio=TEMPORAL_RATIO
    )
    return (LATENT_CHANNELS, *size)
