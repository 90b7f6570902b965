"""A HunyuanVideo in Tencent's layout from the paths that the flags give."""

from pathlib import Path

import torch

from hyquant.devices import resolve_torch_device
from hyquant.errors import ConfigError
from hyquant.models import DTYPES
from hyquant.models.components import is_complete
from hyquant.models.hunyuan_folder import HunyuanSource, load_pipeline, original_source
from hyquant.models.hunyuan_video import HunyuanVideo
from hyquant.models.original_folder import OriginalFolder, require_components
from hyquant.video.arguments import Arguments, flag


def load_video_model(arguments: Arguments, *, num_ranks: int) -> HunyuanVideo:
    """Load the model; its decoder works in tiles, as that of the upstream script.

    Args:
        arguments: The paths, device and dtype.
        num_ranks: How many processes load it, each on a device of its own.

    Raises:
        ConfigError: If a path is missing or is no HunyuanVideo, or guidance is asked of a model that takes none.
        DeviceUnavailable: If the device is not there.
    """
    if num_ranks > 1 and ":" in arguments.device:
        raise ConfigError(
            f"every rank has a device of its own, but --device {arguments.device} names one for all; give "
            f"{arguments.device.partition(':')[0]}"
        )
    device = resolve_torch_device(arguments.device)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else default_dtype(device)
    source = find_video_source(arguments)
    model = HunyuanVideo(
        load_pipeline(source, dtype=dtype), source, name=str(arguments.model_base), device=device, dtype=dtype
    )
    if arguments.embedded_cfg_scale is not None and not model.takes_guidance:
        raise ConfigError(
            "--embedded-cfg-scale guides a model that was distilled with guidance, but these weights were not; use "
            "--cfg-scale"
        )
    model.enable_tiling_()
    return model


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that is used where none is given: float32 on a CPU, bfloat16 on an accelerator."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def find_video_source(arguments: Arguments) -> HunyuanSource:
    """Return where everything lies. Tokenizers lie with their encoders, or in the base folder.

    Raises:
        ConfigError: If something is missing; the message names its flag.
    """
    base = arguments.model_base
    if not base.is_dir():
        raise ConfigError(f"--model-base must be the folder of the checkpoints, but {base} is none; check the path")
    text_encoder = _located("text_encoder_path", arguments)
    text_encoder_2 = _located("text_encoder_2_path", arguments)
    scheduler = base / "scheduler"
    original = OriginalFolder(
        transformer=_located("dit_weight", arguments),
        vae=_located("vae_path", arguments),
        text_encoder=text_encoder,
        tokenizer=_tokenizer(text_encoder, base / "tokenizer"),
        text_encoder_2=text_encoder_2,
        tokenizer_2=_tokenizer(text_encoder_2, base / "tokenizer_2"),
        scheduler=scheduler if is_complete(scheduler, "scheduler") else None,
    )
    require_components(original, base, load_key=arguments.load_key)
    return original_source(base, original, load_key=arguments.load_key, flow_shift=arguments.flow_shift)


def _located(name: str, arguments: Arguments) -> Path:
    """Return a path as it was given, or below the base folder or that of the resolution in it."""
    given: Path = getattr(arguments, name)
    base = arguments.model_base
    places = (given, base / given, base / f"hunyuan-video-t2v-{arguments.model_resolution}" / given)
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise ConfigError(
            f"{flag(name)} must be a path, or one in --model-base, but {given} is not there, nor in {base}; check both"
        )
    return found


def _tokenizer(encoder: Path, beside: Path) -> Path:
    return encoder if is_complete(encoder, "tokenizer") else beside
