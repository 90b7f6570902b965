"""Where the video tokens of a HunyuanVideo denoiser come into being and where they become latents again.

Between the two, every Linear, norm and activation treats each token by itself; only attention looks at others. So the
tokens may be cut there and joined here, and each process works on its strip, as long as attention spans the strips.
Text tokens are few and stay whole.

B batch   S tokens   C channels   D head dim
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hyquant.errors import ConfigError

TokenMap: TypeAlias = Callable[[Tensor, int], Tensor]
"""Called as change(x, dim), `dim` being the dimension of the tokens."""


def require_cuttable(denoiser: nn.Module) -> None:
    """Check that the tokens of a denoiser can be cut into strips.

    Raises:
        ConfigError: If it is no HunyuanVideo of diffusers, treats tokens of the first frame differently, or diffusers
            itself has distributed it.
    """
    if not isinstance(denoiser, HunyuanVideoTransformer3DModel):
        raise ConfigError(
            "sequence parallelism needs diffusers' HunyuanVideoTransformer3DModel, whose tokens are cut at modules of "
            f"known names, but got {type(denoiser).__name__}; load the weights with load_model, which converts the "
            "original layout, or use one rank."
        )
    if denoiser.config.image_condition_type == "token_replace":
        raise ConfigError(
            "sequence parallelism needs blocks that treat all video tokens alike, but this denoiser has "
            "image_condition_type 'token_replace', which treats the first frame's differently; use one rank."
        )
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise ConfigError(
            "a denoiser must be distributed once, but diffusers' enable_parallelism was called on it, which does not "
            "fit HunyuanVideo's mask; load it anew."
        )


def cut_tokens_(denoiser: nn.Module, cut: TokenMap, join: TokenMap) -> list[RemovableHandle]:
    """Let a denoiser work on a part of its video tokens.

    Args:
        denoiser: One that `require_cuttable` accepts; hooks are registered on it.
        cut: Takes the part of embedded video tokens [B, S, C], and of cosines and sines [S, D].
        join: Makes whole again what leaves the last norm, [B, S of the part, C].

    Returns:
        The hooks' handles; removing them undoes it.
    """

    def cut_rotary(module: nn.Module, args: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(cut(table, 0) for table in tables)

    parts: Any = denoiser
    return [
        parts.rope.register_forward_hook(cut_rotary),
        parts.x_embedder.register_forward_hook(lambda module, args, tokens: cut(tokens, 1)),
        # The norm and not the Linear behind it, because quantization exchanges Linears.
        parts.norm_out.register_forward_hook(lambda module, args, tokens: join(tokens, 1)),
    ]
