"""Attention on Ascend by `npu_fusion_attention`, through the back end that diffusers has for it.

The operator takes a mask per pair of tokens, [B, 1, S, S], where HunyuanVideo gives one per key; diffusers drops a mask
that hides nothing and spells any other out. It also gives the operator a window of 65 536 tokens to both sides, which
counts as soon as there is a mask: longer clips are attended in full only if no text is padded.

Sources: torch_npu's documentation of npu_fusion_attention (`atten_mask`, `pre_tockens`, `sparse_mode` 0); the back end
`_native_npu` of diffusers 0.42. Written from them and not run on hardware.

B batch   L text tokens   S tokens of video and text
"""

from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn

from hyquant.errors import ConfigError

_WINDOW = 65536


def attend_by_npu_operator_(denoiser: nn.Module) -> None:
    """Have the blocks of a diffusers denoiser attend by the operator; other models of the process are left alone."""
    for module in denoiser.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = AttentionBackendName("_native_npu")


def require_within_window(num_video_tokens: int, text_mask: Tensor) -> None:
    """Check that every token of a batch would be attended to.

    Args:
        num_video_tokens: Of one clip.
        text_mask: [B, L], 1 for real tokens and 0 for padding.

    Raises:
        ConfigError: If the clip is longer than the operator's window and a prompt is padded.
    """
    num_tokens = num_video_tokens + text_mask.shape[1]
    if num_tokens > _WINDOW and not bool(text_mask.all()):
        raise ConfigError(
            f"with padded prompts an NPU attends at most {_WINDOW} tokens far, but the clip has {num_tokens}; "
            "set batch_size to 1, which pads nothing."
        )
