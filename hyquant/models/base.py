"""What the library needs of a video model: a denoiser with named layers that renders, captures and can be timed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from hyquant.clock import StepClock
from hyquant.config import FrozenModel
from hyquant.models.names import LayerGroup
from hyquant.values import CallValue


class RenderSettings(FrozenModel):
    """Clip size and sampling: height and width in pixels, frames as 4 n + 1, denoising steps, embedded guidance.

    With `round_inputs` guidance and timesteps are rounded to bfloat16, the dtype engines run in, before the denoiser
    sees them, whatever its own dtype: videos of models in float32 and in bfloat16 then differ by arithmetic alone. Off,
    it is left out of what is stored, so that names in caches stay.
    """

    height: Annotated[int, Field(ge=16, multiple_of=16)]
    width: Annotated[int, Field(ge=16, multiple_of=16)]
    num_frames: Annotated[int, Field(ge=1)]
    num_steps: Annotated[int, Field(ge=1)]
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] = 6.0
    batch_size: Annotated[int, Field(ge=1)] = 4
    round_inputs: Annotated[bool, Field(exclude_if=lambda value: not value)] = False


class GuidedSettings(RenderSettings):
    """Sampling with classifier-free guidance too: every step calls the denoiser twice, also without the prompt.

    What a step takes is n + cfg_scale (p - n), with p for the prompt and n for `negative_prompt`.
    Source: Ho and Salimans, arXiv:2207.12598, eq. 6, with cfg_scale = 1 + w.
    """

    cfg_scale: Annotated[float, Field(gt=1.0, allow_inf_nan=False)]
    negative_prompt: str = ""


class DeploymentShape(FrozenModel):
    """The shape latency is measured at: what users will run, usually larger than the rendered clip."""

    height: Annotated[int, Field(ge=16, multiple_of=16)]
    width: Annotated[int, Field(ge=16, multiple_of=16)]
    num_frames: Annotated[int, Field(ge=1)]
    num_steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True)
class Record:
    """One captured denoiser call: step index, prompt index, and the keyword and positional arguments it got."""

    step_index: int
    prompt_index: int
    inputs: Mapping[str, CallValue]
    args: tuple[CallValue, ...] = ()


OnLatents = Callable[[Tensor], None]
"""Takes the latents of a batch, [B, C, T, H, W], after a denoising step."""

RecordSink = Callable[[Record], None]
"""Takes records one by one as a model runs."""


class VideoModel(Protocol):
    """A text-to-video model whose denoiser can be quantized in place.

    `kind` and `source` are what `load_model` was called with.
    `clock` is attached to `denoiser` by a forward pre-hook: during `render` and `capture` it holds the current step.
    """

    name: str
    kind: str
    source: str
    denoiser: nn.Module
    clock: StepClock
    device: torch.device
    dtype: torch.dtype

    def groups(self) -> tuple[LayerGroup, ...]:
        """Return every original Linear of the denoiser, blocks first, as groups of module paths."""
        ...

    def fingerprint(self) -> str:
        """Return `DENOISER-REST`, digests of weights and configuration as they were loaded; names caches."""
        ...

    def render(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: RenderSettings,
        *,
        on_step: Callable[[], None] | None = None,
        on_latents: OnLatents | None = None,
    ) -> list[Tensor]:
        """Render one video per prompt: float32 [T, C, H, W] in [0, 1]; independent of how prompts are batched.

        `on_step` is called after every denoising step, `on_latents` with the batch's latents after it.
        """
        ...

    def capture(self, prompts: Sequence[str], seeds: Sequence[int], settings: RenderSettings, sink: RecordSink) -> None:
        """Hand the denoiser's inputs at every step to `sink`, one prompt at a time, without padded text.

        The tensors are copies on the CPU. The model keeps none of them, so memory is bounded by what the sink keeps.
        """
        ...

    def deployment_inputs(self, shape: DeploymentShape, *, seed: int = 0) -> dict[str, Tensor]:
        """Return keyword inputs of one denoiser call at the deployment shape."""
        ...
