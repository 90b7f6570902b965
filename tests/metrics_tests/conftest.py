"""Small procedural videos: a bright square on a dark ground, as the metrics' tests need them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metrics.hashing import HashingEmbedder

DrawVideo = Callable[..., Tensor]


@pytest.fixture
def draw_video() -> DrawVideo:
    """Return a function that draws a coloured square moving `speed` pixels a frame to the right."""

    def draw(
        *,
        frames: int = 9,
        side: int = 32,
        speed: int = 2,
        colour: tuple[float, float, float] = (0.9, 0.2, 0.1),
        ground: float = 0.1,
    ) -> Tensor:
        video = torch.full((frames, 3, side, side), ground)
        for t in range(frames):
            left = 2 + speed * t
            video[t, :, side // 4 : side // 2, left : left + side // 4] = torch.tensor(colour)[:, None, None]
        return video

    return draw


@pytest.fixture
def embedder() -> HashingEmbedder:
    return HashingEmbedder()
