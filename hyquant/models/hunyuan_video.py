"""HunyuanVideo through diffusers' own pipeline: the shipped mini weights and real weights take the same path.

The pipeline samples and decodes; this adapter adds what it lacks: noise per seed, text padded to its batch only, a
clock that knows the step before each denoiser call, records of the denoiser's inputs, and errors where the pipeline is
silent. Text is trimmed because padded rows change nothing in the video but distort activation ranges and, on NPUs,
force a dense attention mask.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from hyquant.clock import StepClock, attach_clock
from hyquant.config import digest
from hyquant.models.base import DeploymentShape, GuidedSettings, OnLatents, Record, RecordSink, RenderSettings
from hyquant.models.embedding import TextEmbedding, pad_together
from hyquant.models.fingerprint import denoiser_digest, plain_config, tensors_digest
from hyquant.models.hunyuan_folder import HunyuanSource, find_source, load_pipeline
from hyquant.models.hunyuan_text import PromptEncoder
from hyquant.models.names import LayerGroup, layer_groups
from hyquant.models.npu_attention import attend_by_npu_operator_, require_within_window
from hyquant.models.sampling import (
    batches,
    draw_noise,
    guidance_input,
    is_guidance_exact,
    latent_size,
    nearest_exact_guidance,
    round_inputs,
)

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

logger = logging.getLogger(__name__)

OnStep = Callable[[], None]


class HunyuanVideo:
    """The `VideoModel` protocol over a `HunyuanVideoPipeline`.

    Args:
        pipe: Pipeline with all components, on the CPU; its text encoders are moved out of it.
        source: Where it came from and how it is called.
        name: What the user called it.
        device: Where denoiser and decoder live; text encoders visit it while they work.
        dtype: Dtype of all weights.
    """

    kind = "hunyuan_video"

    def __init__(
        self,
        pipe: "HunyuanVideoPipeline",
        source: HunyuanSource,
        *,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.name = f"hunyuan_video/{name}"
        self.source = name
        self.device = device
        self.dtype = dtype
        self._pipe, encoders = split_pipeline(pipe)
        self._prompts = PromptEncoder(
            encoders,
            prompt_template=source.prompt_template,
            max_sequence_length=source.max_sequence_length,
            device=device,
        )
        self._fingerprint = pipeline_fingerprint(pipe, self._prompts.template)
        self._pipe.transformer.eval().requires_grad_(False)
        self._pipe.to(device)
        self._pipe.set_progress_bar_config(disable=True)
        self.denoiser: nn.Module = self._pipe.transformer
        if device.type == "npu":
            attend_by_npu_operator_(self.denoiser)
        self.clock = StepClock()
        self._groups = layer_groups(self.denoiser)
        self._is_running = False
        self._has_warned = False
        attach_clock(self.denoiser, self.clock, self._step_index)

    def groups(self) -> tuple[LayerGroup, ...]:
        """Return every original Linear of the denoiser as a group of module paths."""
        return self._groups

    @property
    def vae(self) -> nn.Module:
        """Return what decodes latents to pixels."""
        decoder: nn.Module = self._pipe.vae
        return decoder

    @property
    def takes_guidance(self) -> bool:
        """Say whether the denoiser was distilled with guidance, and so takes it as an input."""
        return bool(self._pipe.transformer.config.guidance_embeds)

    def enable_tiling_(self) -> None:
        """Have the decoder work in tiles, which bounds its memory; clips that fit one tile are not cut."""
        from hyquant.models.vae_pieces import enable_tiling_

        enable_tiling_(self.vae)

    def fingerprint(self) -> str:
        """Return the digests of the weights as they were loaded."""
        return self._fingerprint

    def embed(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Return one embedding per prompt on the CPU; each prompt is encoded once.

        Raises:
            ConfigError: If a prompt is too long or holds unknown words.
        """
        return self._prompts.embed(list(prompts))

    def render(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: RenderSettings,
        *,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> list[Tensor]:
        """Render one video per prompt: float32 [T, C, H, W] in [0, 1], on the CPU.

        Raises:
            ConfigError: If a prompt cannot be encoded, seeds and prompts differ in number, or the clip does not fit.
        """
        self.embed(prompts)
        videos: list[Tensor] = []
        for batch_prompts, batch_seeds in batches(prompts, seeds, settings.batch_size):
            frames = self._run(
                batch_prompts, batch_seeds, settings, output_type="pt", on_step=on_step, on_latents=on_latents
            )
            videos.extend(frames.float().cpu())
        return videos

    def capture(self, prompts: Sequence[str], seeds: Sequence[int], settings: RenderSettings, sink: RecordSink) -> None:
        """Hand the denoiser's inputs at every step to `sink`, one prompt at a time, copied to the CPU.

        Raises:
            ConfigError: As `render`.
        """
        for prompt_index, (prompt, seed) in enumerate(batches(prompts, seeds, 1)):
            with self._recording(sink, prompt_index):
                self._run(prompt, seed, settings, output_type="latent")

    def deployment_inputs(self, shape: DeploymentShape, *, seed: int = 0) -> dict[str, Tensor]:
        """Return keyword inputs of one denoiser call at the deployment shape, with dtypes as in `render`.

        The text is the longest prompt embedded so far; without any, noise of full length.
        """
        config = self._pipe.transformer.config
        text = self._prompts.longest() or TextEmbedding(
            tokens=draw_noise([seed], (self._prompts.max_sequence_length, config.text_embed_dim))[0],
            pooled=draw_noise([seed], (config.pooled_projection_dim,))[0],
        )
        tokens, pooled, mask = pad_together([text] * shape.batch_size)
        latents = draw_noise(range(seed, seed + shape.batch_size), self._latent_shape(shape))
        inputs = {
            "hidden_states": latents,
            "encoder_hidden_states": tokens,
            "encoder_attention_mask": mask,
            "pooled_projections": pooled,
            "guidance": guidance_input(6.0, shape.batch_size, dtype=self.dtype, device=self.device),
        }
        on_device = {name: tensor.to(self.device, self.dtype) for name, tensor in inputs.items()}
        return on_device | {"timestep": torch.full((shape.batch_size,), 500.0, device=self.device)}

    def _run(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: RenderSettings,
        *,
        output_type: str,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> Tensor:
        if not settings.round_inputs:
            self._warn_once_of_rounded_guidance(settings.guidance_scale)
        tokens, pooled, mask = pad_together(self.embed(prompts))
        if self.device.type == "npu":
            require_within_window(self._num_video_tokens(settings), mask)

        def step_end(pipe: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_latents is not None:
                on_latents(tensors["latents"])
            if on_step is not None:
                on_step()
            return tensors

        latents = draw_noise(seeds, self._latent_shape(settings))
        with self._running(settings.num_steps), self._rounding(settings):
            (video,) = self._pipe(
                prompt_embeds=tokens.to(self.device),
                pooled_prompt_embeds=pooled.to(self.device),
                prompt_attention_mask=mask.to(self.device),
                latents=latents,
                height=settings.height,
                width=settings.width,
                num_frames=settings.num_frames,
                num_inference_steps=settings.num_steps,
                guidance_scale=settings.guidance_scale,
                **self._without_prompt(settings, len(prompts)),
                callback_on_step_end=step_end,
                output_type=output_type,
                return_dict=False,
            )
        assert isinstance(video, Tensor)
        return video

    def _without_prompt(self, settings: RenderSettings, batch_size: int) -> dict[str, Any]:
        """Return what the pipeline needs for classifier-free guidance; nothing where there is none."""
        if not isinstance(settings, GuidedSettings):
            return {}
        tokens, pooled, mask = pad_together(self.embed([settings.negative_prompt] * batch_size))
        return {
            "true_cfg_scale": settings.cfg_scale,
            "negative_prompt_embeds": tokens.to(self.device),
            "negative_pooled_prompt_embeds": pooled.to(self.device),
            "negative_prompt_attention_mask": mask.to(self.device),
        }

    def _step_index(self) -> int | None:
        """Return the step whose denoiser call comes next; None outside the pipeline's loop.

        The scheduler counts the steps it has finished, and has no count before the first.
        """
        return (self._pipe.scheduler.step_index or 0) if self._is_running else None

    @contextmanager
    def _running(self, num_steps: int) -> Iterator[None]:
        self.clock.num_steps = num_steps
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False

    @contextmanager
    def _rounding(self, settings: RenderSettings) -> Iterator[None]:
        """Round guidance and timesteps before anything else sees them, records included, if the settings say so."""
        if not settings.round_inputs:
            yield
            return

        def rounded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, round_inputs(kwargs)

        handle = self.denoiser.register_forward_pre_hook(rounded, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _recording(self, sink: RecordSink, prompt_index: int) -> Iterator[None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            step_index = self._step_index()
            assert step_index is not None
            tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
            copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            sink(Record(step_index, prompt_index, copies))

        handle = self.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _latent_shape(self, clip: RenderSettings | DeploymentShape) -> tuple[int, ...]:
        size = latent_size(
            clip.height,
            clip.width,
            clip.num_frames,
            spatial_ratio=self._pipe.vae_scale_factor_spatial,
            temporal_ratio=self._pipe.vae_scale_factor_temporal,
        )
        return (self._pipe.transformer.config.in_channels, *size)

    def _num_video_tokens(self, clip: RenderSettings | DeploymentShape) -> int:
        config = self._pipe.transformer.config
        _, frames, height, width = self._latent_shape(clip)
        return int(frames // config.patch_size_t * (height // config.patch_size) * (width // config.patch_size))

    def _warn_once_of_rounded_guidance(self, guidance_scale: float) -> None:
        if self._has_warned or is_guidance_exact(guidance_scale, self.dtype):
            return
        self._has_warned = True
        logger.warning(
            "guidance_scale=%g times 1000 is rounded in %s; compare only with references of the same dtype, or use %g",
            guidance_scale,
            self.dtype,
            nearest_exact_guidance(guidance_scale, self.dtype),
        )


def load_hunyuan_video(
    source: str, *, device: torch.device, dtype: torch.dtype, load_key: str = "module"
) -> HunyuanVideo:
    """Load HunyuanVideo: "mini", "mini-outliers" or a folder in diffusers' or Tencent's layout.

    Args:
        source: One of the names, or a folder.
        device: Where denoiser and decoder live.
        dtype: Dtype of all weights.
        load_key: Which set of weights of an original checkpoint: "module", or "ema" for averaged ones.

    Raises:
        ConfigError: If the folder or a component is missing or unreadable.
    """
    found = find_source(source, load_key=load_key)
    return HunyuanVideo(load_pipeline(found, dtype=dtype), found, name=source, device=device, dtype=dtype)


def split_pipeline(pipe: "HunyuanVideoPipeline") -> tuple["HunyuanVideoPipeline", "HunyuanVideoPipeline"]:
    """Return a pipeline that denoises and decodes, and one that encodes text: their components never share a device."""
    parts = pipe.components
    text = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    renderer = type(pipe)(**{name: None if name in text else part for name, part in parts.items()})
    encoders = type(pipe)(**{name: part if name in text else None for name, part in parts.items()})
    return renderer, encoders


def pipeline_fingerprint(pipe: "HunyuanVideoPipeline", template: dict[str, Any]) -> str:
    """Return `DENOISER-REST`: the denoiser's digest, and that of all that comes before and after it.

    The rest is text encoders, decoder, vocabularies, scheduler and prompt template.
    """
    rest: list[JsonValue] = [
        tensors_digest(module.state_dict(), None) for module in (pipe.text_encoder, pipe.text_encoder_2, pipe.vae)
    ]
    calling: dict[str, JsonValue] = {
        "parts": rest,
        "vocabularies": [digest(tokenizer.get_vocab()) for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)],
        "scheduler": plain_config(pipe.scheduler.config),
        "template": template,
    }
    return f"{denoiser_digest(pipe.transformer)}-{digest(calling)}"
