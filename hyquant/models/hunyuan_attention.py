"""diffusers' HunyuanVideo attention with a hook between q, k, v and the attention itself, which may be replaced too.

With neither a hook that changes anything nor a replacement it computes, bit by bit, what diffusers' own processor does:
project, normalize per head, rotate the video tokens, join video and text, attend, and project back where the block has
projections.

B batch   S tokens   A heads   D head dim   C channels
"""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor

from hyquant.errors import ConfigError
from hyquant.models.attentions import Attend, AttendingHook, QkvHook


class BlockProcessor:
    """A processor for the attention of HunyuanVideo's blocks that shows q, k and v to a hook and lets others attend.

    Args:
        replaced: The processor in whose place it is; its back end and its parallel configuration are used.

    Attributes:
        hook: What is called before the attention, if anything.
        attending: The hook, if it attends itself unless something else does.
        attend: What is called instead of the attention, if anything.
    """

    def __init__(self, replaced: Any) -> None:
        self.replaced = replaced
        self.hook: QkvHook | None = None
        self.attending: AttendingHook | None = None
        self.attend: Attend | None = None
        self._attention_backend = replaced._attention_backend
        self._parallel_config = replaced._parallel_config

    @classmethod
    def in_place_of(cls, current: object, path: str) -> "BlockProcessor":
        """Return the processor of an attention if it is one already, else one that takes its place.

        Raises:
            ConfigError: If the attention has a processor that does something else than diffusers' own.
        """
        if isinstance(current, cls):
            return current
        if type(current) is not HunyuanVideoAttnProcessor2_0:
            raise ConfigError(
                f"the attention of {path} must have diffusers' HunyuanVideoAttnProcessor2_0 to be intercepted, but has "
                f"{type(current).__name__}; put that one back or leave attention in float."
            )
        return cls(current)

    def settled(self) -> Any:
        """Return the processor that is to stay: itself while it has something to do, else the one it replaced."""
        return self.replaced if self.hook is None and self.attend is None else self

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend over video and text.

        Args:
            attn: diffusers' `Attention`; one of a double block projects text by layers of its own.
            hidden_states: [B, S_video, C].
            encoder_hidden_states: [B, S_text, C].
            attention_mask: [B, 1, 1, S] bool, False for padded text; None for none.
            image_rotary_emb: Cosines and sines of the video tokens, each [S_video, D].

        Returns:
            Video [B, S_video, C] and text [B, S_text, C].
        """
        num_video = hidden_states.shape[1]
        if attn.add_q_proj is None:
            both = torch.cat((hidden_states, encoder_hidden_states), dim=1)
            q, k, v = _projected(both, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
            q, k = (_rotated(x, num_video, image_rotary_emb) for x in (q, k))
        else:
            own = _projected(hidden_states, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
            text = _projected(
                encoder_hidden_states,
                attn.heads,
                (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
                (attn.norm_added_q, attn.norm_added_k),
            )
            video = (*(_rotated(x, num_video, image_rotary_emb) for x in own[:2]), own[2])
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(video, text, strict=True))
        dtype = q.dtype
        valid = None if attention_mask is None else attention_mask[:, 0, 0]
        out_BSC = self._attended(q, k, v, valid).flatten(2, 3).to(dtype)
        video_out, text_out = out_BSC[:, :num_video], out_BSC[:, num_video:]
        if attn.to_out is not None:
            for layer in attn.to_out:
                video_out = layer(video_out)
        return video_out, text_out if attn.to_add_out is None else attn.to_add_out(text_out)

    def attends_on(self, device: torch.device) -> bool:
        """Return whether the hook attends itself for q, k and v on a device."""
        return self.attending is not None and self.attend is None and self.attending.device == device

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Attend by whichever of hook, replacement and back end is to: [B, S, A, D]."""
        if self.attending is not None and self.attends_on(q.device):
            return self.attending.attend(q, k, v, valid)
        if self.hook is not None:
            q, k, v = self.hook(q, k, v, valid)
        return self._attend(q, k, v, valid) if self.attend is None else self.attend(q, k, v, valid, self._attend)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Attend by diffusers' back end: [B, S, A, D], keys that are not valid left out."""
        out: Tensor = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=None if valid is None else valid[:, None, None],
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return out


def _projected(x_BSC: Tensor, heads: int, layers: tuple[Any, ...], norms: tuple[Any, Any]) -> tuple[Tensor, ...]:
    """Return q, k and v, [B, S, A, D], of which the first two are normalized per head."""
    q, k, v = (layer(x_BSC).unflatten(2, (heads, -1)) for layer in layers)
    norm_q, norm_k = norms
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


def _rotated(x_BSAD: Tensor, num_video: int, rotary_emb: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return x with the rotary embedding applied to its first `num_video` tokens."""
    if rotary_emb is None:
        return x_BSAD
    video = apply_rotary_emb(x_BSAD[:, :num_video], rotary_emb, sequence_dim=1)
    return video if num_video == x_BSAD.shape[1] else torch.cat((video, x_BSAD[:, num_video:]), dim=1)
