"""Text embeddings of single prompts, and how a batch of them is padded for the denoiser.

A prompt's embedding holds its real tokens only. A batch is padded to its own longest prompt, never further: padded rows
change nothing in the video but are visible to whoever looks at activations, and cost attention time.

    B batch   L tokens   E text width   P pooled width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextEmbedding:
    """One prompt as the denoiser reads it.

    Attributes:
        tokens: [L, E] hidden states of the prompt's real tokens.
        pooled: [P] embedding of the whole prompt.
    """

    tokens: Tensor
    pooled: Tensor


def pad_together(embeddings: Sequence[TextEmbedding]) -> tuple[Tensor, Tensor, Tensor]:
    """Stack embeddings, padding tokens with zeros up to the longest of them.

    Returns:
        tokens [B, L, E], pooled [B, P] and mask [B, L] of the tokens' dtype, 1 for real tokens and 0 for padding.
    """
    lengths = torch.tensor([embedding.tokens.shape[0] for embedding in embeddings])
    tokens_BLE = torch.nn.utils.rnn.pad_sequence([embedding.tokens for embedding in embeddings], batch_first=True)
    mask_BL = torch.arange(tokens_BLE.shape[1]) < lengths[:, None]
    pooled_BP = torch.stack([embedding.pooled for embedding in embeddings])
    return tokens_BLE, pooled_BP, mask_BL.to(tokens_BLE.dtype).to(tokens_BLE.device)
