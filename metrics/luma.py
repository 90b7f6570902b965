"""How bright a pixel looks: the luma of its red, green and blue.

Source: ITU-R BT.709-6, item 3.2.
"""

from torch import Tensor

_RED, _GREEN, _BLUE = 0.2126, 0.7152, 0.0722


def luma(video_TCHW: Tensor) -> Tensor:
    """Return the luma of a [T, 3, H, W] video in [0, 1]: [T, H, W] float32 in [0, 1]."""
    red, green, blue = video_TCHW.float().unbind(dim=1)
    return _RED * red + _GREEN * green + _BLUE * blue
