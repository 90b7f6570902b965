"""Video models by kind: the table `MODELS`, entry points of the group "hyq.models", and `load_model`.

A model is whatever fulfils `hyquant.models.base.VideoModel`. Heavy libraries are imported when a model is loaded.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from hyquant.devices import resolve_torch_device
from hyquant.errors import ConfigError
from hyquant.plugins import find_entry

if TYPE_CHECKING:
    from hyquant.models.base import VideoModel

ENTRY_POINT_GROUP = "hyq.models"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _load_hunyuan_video(source: str, *, device: torch.device, dtype: torch.dtype) -> "VideoModel":
    from hyquant.models.hunyuan_video import load_hunyuan_video

    return load_hunyuan_video(source, device=device, dtype=dtype)


def _load_tiny(source: str, *, device: torch.device, dtype: torch.dtype) -> "VideoModel":
    from hyquant.models.tiny import load_tiny

    return load_tiny(source, device=device, dtype=dtype)


Loader = Callable[..., "VideoModel"]
"""Called as `loader(source, device=torch.device, dtype=torch.dtype)`."""

MODELS: Mapping[str, Loader] = {"hunyuan_video": _load_hunyuan_video, "tiny": _load_tiny}


def require_model(kind: str, source: str) -> None:
    """Look for a model without loading it; a kind that somebody else offers is looked for, its source is not.

    Raises:
        ConfigError: If the kind is unknown, or the source is none of that kind; the message lists what is known.
    """
    find_entry(MODELS, ENTRY_POINT_GROUP, kind)
    if kind == "hunyuan_video":
        from hyquant.models.hunyuan_folder import find_source

        find_source(source)
    elif kind == "tiny":
        from hyquant.models.tiny import seed_of

        seed_of(source)


def require_frames(kind: str, num_frames: int) -> None:
    """Check how many frames a clip has, without loading a model; a kind that somebody else offers has its own rules.

    Raises:
        ConfigError: If a model of this kind renders no such clip; the message says which it does.
    """
    if kind in MODELS:
        from hyquant.models.sampling import require_whole_latents

        require_whole_latents(num_frames)


def load_model(kind: str, source: str, *, device: str = "auto", dtype: str = "float32") -> "VideoModel":
    """Load a video model.

    Args:
        kind: Entry of `MODELS` or name of an entry point "hyq.models".
        source: What the kind loads: for "hunyuan_video" "mini", "mini-outliers" or a folder in diffusers' or
            Tencent's layout; for "tiny" the seed of its weights.
        device: "auto", or a device as torch writes it, such as "cpu" or "npu:1".
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        ConfigError: If kind, source or dtype are unknown; the message lists what is known.
        DeviceUnavailable: If the device is not there.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}")
    loader = find_entry(MODELS, ENTRY_POINT_GROUP, kind)
    return loader(source, device=resolve_torch_device(device), dtype=DTYPES[dtype])
