"""Changes of how a float model computes that are none on paper: what they move in a video is rounding.

batch split       every prompt rendered alone instead of in batches
math attention    attention as plain matrix products instead of a fused kernel, where its scores fit in memory
split sums        every Linear summed in two halves of its input channels, as tensor parallelism over two ranks does;
                  needs no memory and works on every device
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hyquant.models.base import DeploymentShape, RenderSettings, VideoModel

MAX_MATH_TOKENS = 8192
"""Tokens of a clip whose attention scores, tokens squared for each head, are small: 6 GB for 24 heads in float32."""


class SplitSums(TorchFunctionMode):
    """Inside it every Linear is the sum of two products, over the first and the second half of its input channels."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Take the place of `torch.nn.functional.linear`, and call everything else as it is."""
        return _linear_in_halves(*args, **(kwargs or {})) if func is F.linear else func(*args, **(kwargs or {}))


def _linear_in_halves(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    half = weight.shape[1] // 2
    product = F.linear(input[..., :half], weight[:, :half]) + F.linear(input[..., half:], weight[:, half:])
    return product if bias is None else product + bias


@dataclass(frozen=True)
class NeutralChange:
    """One way to render the same videos otherwise.

    Attributes:
        name: What it is called.
        context: Inside what to render.
        settings: Turns a study's settings into those to render with.
        obstacle: Returns why it cannot be rendered, or would change nothing; None if it can.
    """

    name: str
    context: Callable[[], AbstractContextManager[Any]]
    settings: Callable[[RenderSettings], RenderSettings]
    obstacle: Callable[[VideoModel, RenderSettings], str | None]


def _alone(settings: RenderSettings) -> RenderSettings:
    return settings.model_copy(update={"batch_size": 1})


def _same(settings: RenderSettings) -> RenderSettings:
    return settings


def _no_batches(model: VideoModel, settings: RenderSettings) -> str | None:
    return "the study renders each prompt alone" if settings.batch_size == 1 else None


def _no_math(model: VideoModel, settings: RenderSettings) -> str | None:
    if model.device.type == "npu":
        return "an NPU has its own attention operator"
    tokens = _num_tokens(model, settings)
    if tokens > MAX_MATH_TOKENS:
        return f"the scores of {tokens} tokens would not fit in memory"
    return None


def _nothing(model: VideoModel, settings: RenderSettings) -> str | None:
    return None


def _num_tokens(model: VideoModel, settings: RenderSettings) -> int:
    """Return the tokens of a clip: its latent, [B, C, T, H, W], in patches of 1 x 2 x 2."""
    sizes = settings.model_dump(include={"height", "width", "num_frames", "num_steps"})
    latents = model.deployment_inputs(DeploymentShape(**sizes))["hidden_states"]
    return latents[0, 0].numel() // 4


CHANGES = (
    NeutralChange("batch split", nullcontext, _alone, _no_batches),
    NeutralChange("math attention", lambda: sdpa_kernel(SDPBackend.MATH), _same, _no_math),
    NeutralChange("split sums", SplitSums, _same, _nothing),
)
"""In the order in which they are rendered."""


def render_changed(
    model: VideoModel,
    change: NeutralChange,
    pairs: Sequence[tuple[str, int]],
    settings: RenderSettings,
    *,
    on_step: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Render prompts with their seeds under a neutral change: float32 [T, C, H, W] in [0, 1] each.

    The denoiser must be in float and not compiled.
    """
    prompts, seeds = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
    with change.context():
        return model.render(prompts, seeds, change.settings(settings), on_step=on_step)
