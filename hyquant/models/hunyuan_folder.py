"""Read HunyuanVideo from a folder in diffusers layout, or the shipped mini weights; never from the network."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hyquant.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

logger = logging.getLogger(__name__)

COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

_MARKS = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}


@dataclass(frozen=True)
class HunyuanSource:
    """Where weights are and how their pipeline must be called.

    Attributes:
        folder: Folder in diffusers layout.
        prompt_template: The pipeline's template with "template" and "crop_start"; None for the published weights' own.
        max_sequence_length: Longest prompt in tokens, template not counted.
        has_outliers: Whether synthetic outliers are put into the weights after loading.
    """

    folder: Path
    prompt_template: dict[str, str | int] | None = None
    max_sequence_length: int = 256
    has_outliers: bool = False


def find_source(source: str) -> HunyuanSource:
    """Return what "mini", "mini-outliers" or a folder name stand for.

    Raises:
        ConfigError: If there is no such folder, or a component of the pipeline is missing in it.
    """
    if source in ("mini", "mini-outliers"):
        from hyquant.models import mini

        found = HunyuanSource(
            folder=mini.WEIGHTS,
            prompt_template=mini.PROMPT_TEMPLATE,
            max_sequence_length=mini.MAX_SEQUENCE_LENGTH,
            has_outliers=source == "mini-outliers",
        )
    else:
        found = HunyuanSource(folder=Path(source).expanduser())
    _check_folder(found.folder, source)
    return found


def _check_folder(folder: Path, source: str) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"source must be mini, mini-outliers or a folder in diffusers layout, but got {source!r}, and {folder} is "
            "no folder; download hunyuanvideo-community/HunyuanVideo and give its folder"
        )
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"a folder in diffusers layout holds model_index.json, but {folder} does not; give the folder that "
            "contains transformer/, vae/ and the others (original Tencent checkpoints must be converted first)"
        )
    missing = [name for name in COMPONENTS if not _is_complete(folder / name, name)]
    if missing:
        raise ConfigError(
            f"HunyuanVideo consists of {', '.join(COMPONENTS)}, but {folder} lacks files of {', '.join(missing)}; "
            "complete the download"
        )


def _is_complete(folder: Path, name: str) -> bool:
    if name in _MARKS:
        return (folder / _MARKS[name]).is_file()
    indexes = list(folder.glob("*.safetensors.index.json"))
    shards = {shard for index in indexes for shard in json.loads(index.read_text())["weight_map"].values()}
    has_weights = bool(shards) or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return (folder / "config.json").is_file() and has_weights and all((folder / shard).is_file() for shard in shards)


def load_pipeline(source: HunyuanSource, *, dtype: torch.dtype) -> "HunyuanVideoPipeline":
    """Load all components on the CPU, without network and without progress bars.

    Raises:
        ConfigError: If a file cannot be read as what it should be.
    """
    from diffusers import HunyuanVideoPipeline
    from safetensors import SafetensorError

    import hyquant.models.pca_codec  # noqa: F401  (diffusers loads classes of ours only from modules already imported)

    load_dtype = torch.float32 if source.has_outliers else dtype  # outlier factors are exact in float32
    logger.info("load hunyuan_video folder=%s dtype=%s", source.folder, dtype)
    try:
        with _quiet():
            pipe = HunyuanVideoPipeline.from_pretrained(str(source.folder), dtype=load_dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{source.folder} must load as a HunyuanVideoPipeline, but it does not: {error}") from error
    if source.has_outliers:
        from hyquant.models import mini
        from hyquant.models.mini.outliers import apply_outliers_, load_outliers

        apply_outliers_(pipe.transformer, load_outliers(mini.OUTLIERS))
        with _quiet():
            pipe.to(dtype)
    return pipe


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch loading bars and diffusers' warnings off (it frowns at our codec), and back to what they were."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        for library in shown:
            library.enable_progress_bar()
