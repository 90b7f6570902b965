"""HunyuanVideo's denoiser without weights: its modules, names, shapes and configuration, on the meta device."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import nn

from hyquant.errors import ConfigError
from hyquant.models.hunyuan_folder import quiet
from hyquant.models.original_folder import denoiser_config, json_table

CLASS_NAME = "HunyuanVideoTransformer3DModel"


def diffusers_skeleton(folder: Path) -> nn.Module:
    """Return the denoiser that config.json of a folder in diffusers' layout describes.

    Raises:
        ConfigError: If there is no config.json, or it is of something else.
    """
    from diffusers import HunyuanVideoTransformer3DModel

    path = folder / "config.json"
    config = json_table(path)
    if config.get("_class_name", CLASS_NAME) != CLASS_NAME or not config:
        raise ConfigError(
            f"weights with diffusers' names must lie beside config.json of a {CLASS_NAME}, but {path} "
            f"{'is of ' + str(config['_class_name']) if config else 'does not exist'}; give the denoiser's folder"
        )
    try:
        with quiet(), torch.device("meta"):
            denoiser: nn.Module = HunyuanVideoTransformer3DModel.from_config(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} must describe a {CLASS_NAME}, but it does not: {error}") from error
    return denoiser.eval()


def published_skeleton() -> nn.Module:
    """Return the denoiser of the published HunyuanVideo, 13 billion weights: diffusers' defaults."""
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        denoiser: nn.Module = HunyuanVideoTransformer3DModel()
    return denoiser.eval()


def original_skeleton(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> nn.Module:
    """Return the denoiser, in diffusers' layout, that weights with original names belong to.

    Args:
        shapes: Shapes by original name.
        folder: Where they lie; config.json there may hold `rope_dim_list`.

    Raises:
        ConfigError: If weights are missing or contradict each other.
    """
    from diffusers import HunyuanVideoTransformer3DModel

    extra: Mapping[str, JsonValue] = json_table(folder / "config.json")
    try:
        with torch.device("meta"):
            config = denoiser_config({name: torch.empty(shape) for name, shape in shapes.items()}, extra)
            denoiser: nn.Module = HunyuanVideoTransformer3DModel(**config)
    except (TypeError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        raise ConfigError(f"{folder} must hold weights that fit together, but they do not: {error}") from error
    return denoiser.eval()
