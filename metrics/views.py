"""What an image model gets to see of a video: every frame, or one picture made of four frames.

An image embedding of single frames cannot tell moving left from moving right. The grid can: its four frames stand side
by side, so motion becomes the arrangement of one picture.

    T frames   C colours   H, W height, width   V views
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

ViewName = Literal["frames", "grid"]


def frames_view(video_TCHW: Tensor) -> Tensor:
    """Return every frame as a view of its own: [T, C, H, W]."""
    return video_TCHW


def grid_view(video_TCHW: Tensor) -> Tensor:
    """Return four frames, evenly spread from first to last, tiled 2 x 2 in reading order: [1, C, 2 H, 2 W].

    Of 13 frames these are 0, 4, 8 and 12; a video of fewer than four frames repeats some.
    """
    last = video_TCHW.shape[0] - 1
    first, second, third, fourth = (video_TCHW[round(last * k / 3)] for k in range(4))
    upper = torch.cat((first, second), dim=-1)
    lower = torch.cat((third, fourth), dim=-1)
    return torch.cat((upper, lower), dim=-2)[None]


VIEWS: dict[ViewName, Callable[[Tensor], Tensor]] = {"frames": frames_view, "grid": grid_view}
