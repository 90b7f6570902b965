"""An embedder without weights: fixed random projections of coarse pixels and of hashed words.

It is a real embedder - deterministic, unit length, sensitive to pixels and to words - that knows nothing about meaning:
a video and its prompt are no closer than chance. Made for tests and for trying out a study before a judge is installed.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.views import VIEWS, ViewName

_SIDE = 8  # pixels of the thumbnail that is projected
_SEED = 20


class HashingEmbedder:
    """Embed views by projecting 8 x 8 thumbnails, prompts by adding up one random vector per word."""

    def __init__(self, *, view: ViewName = "frames", embedding_dim: int = 64) -> None:
        self._view = VIEWS[view]
        self._embedding_dim = embedding_dim
        generator = torch.Generator().manual_seed(_SEED)
        num_features = 3 * _SIDE * _SIDE + 1  # and a constant, so that no picture projects to zero
        self._projection = torch.randn(num_features, embedding_dim, generator=generator)

    def embed_video(self, video: Tensor) -> Tensor:
        """Return [V, E] unit vectors of the views of a [T, 3, H, W] video."""
        thumbnails = F.adaptive_avg_pool2d(self._view(video.float().cpu()), _SIDE).flatten(1)
        constant = torch.ones(len(thumbnails), 1)
        return F.normalize(torch.cat((thumbnails - 0.5, constant), dim=1) @ self._projection, dim=1)

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Return [P, E] unit vectors; a prompt is the set of its lower-case words."""
        return F.normalize(torch.stack([self._embed_words(prompt) for prompt in prompts]), dim=1)

    def _embed_words(self, prompt: str) -> Tensor:
        words = sorted(set(prompt.lower().split())) or [""]
        return torch.stack([self._word_vector(word) for word in words]).sum(dim=0)

    def _word_vector(self, word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
        return torch.randn(self._embedding_dim, generator=torch.Generator().manual_seed(seed))
