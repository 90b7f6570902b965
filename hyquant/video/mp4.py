"""H.264 in an MP4 file, by PyAV: what browsers play."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CODEC = "libx264"


def has_encoder() -> bool:
    """Tell whether PyAV was built with the encoder.

    Raises:
        ImportError: If PyAV is not installed.
    """
    from av.codec import codecs_available

    return CODEC in codecs_available


def encode_mp4(
    path: Path,
    frames: "Iterable[npt.NDArray[np.uint8]]",
    *,
    size: tuple[int, int],
    fps: int,
    options: Mapping[str, str],
) -> None:
    """Write frames as H.264 in 4:2:0.

    Args:
        path: File to write.
        frames: uint8 [H, W, 3] each, contiguous.
        size: Their H and W, both even.
        fps: Frames per second.
        options: Of the encoder, such as {"crf": "20"}.

    Raises:
        OSError: If the file cannot be written.
    """
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(CODEC, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.options = dict(options)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
