"""Read HunyuanVideo from a folder in diffusers' or Tencent's layout, or the shipped mini; never from the network."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from hyquant.errors import ConfigError, HyquantError
from hyquant.models.components import COMPONENTS, is_complete
from hyquant.models.original_folder import (
    DENOISER,
    OriginalFolder,
    find_original,
    load_components,
    read_prompt_template,
)

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HunyuanSource:
    """Where weights are and how their pipeline must be called.

    Attributes:
        folder: The folder.
        prompt_template: The pipeline's template with "template" and "crop_start"; None for the published weights' own.
        max_sequence_length: Longest prompt in tokens, template not counted.
        has_outliers: Whether synthetic outliers are put into the weights after loading.
        original: Where things lie if the folder is in Tencent's layout; None for diffusers' layout.
        load_key: Which set of weights of an original checkpoint: "module", or "ema" for averaged ones.
        flow_shift: Shift of the scheduler's noise levels; None for that of the folder.
    """

    folder: Path
    prompt_template: dict[str, str | int] | None = None
    max_sequence_length: int = 256
    has_outliers: bool = False
    original: OriginalFolder | None = None
    load_key: str = "module"
    flow_shift: float | None = None


def find_source(source: str, *, load_key: str = "module") -> HunyuanSource:
    """Return what "mini", "mini-outliers" or a folder name stand for.

    Args:
        source: One of the two names, or a folder in diffusers' or in Tencent's layout.
        load_key: Which set of weights of an original checkpoint: "module" or "ema".

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
        found = _find_folder(Path(source).expanduser(), source, load_key)
    if found.original is None:
        _check_components(found.folder)
    return found


def _find_folder(folder: Path, source: str, load_key: str) -> HunyuanSource:
    _check_folder(folder, source)
    if (folder / "model_index.json").is_file():
        return HunyuanSource(folder=folder)
    original = find_original(folder, load_key=load_key)
    if original is None:
        raise ConfigError(
            f"a folder in diffusers layout holds model_index.json, but {folder} does not, and it has no {DENOISER}/ of "
            "Tencent's layout either; give the folder that contains the weights of all components"
        )
    return original_source(folder, original, load_key=load_key)


def original_source(
    folder: Path, original: OriginalFolder, *, load_key: str = "module", flow_shift: float | None = None
) -> HunyuanSource:
    """Return the source of components in Tencent's layout, with the prompt template that lies in a folder.

    Raises:
        ConfigError: If the template cannot be read.
    """
    template = read_prompt_template(folder)
    length = template.pop("max_sequence_length", 256)
    return HunyuanSource(
        folder=folder,
        prompt_template=template or None,
        max_sequence_length=int(length),
        original=original,
        load_key=load_key,
        flow_shift=flow_shift,
    )


def _check_folder(folder: Path, source: str) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"source must be mini, mini-outliers or a folder in diffusers or Tencent layout, but got {source!r}, and "
            f"{folder} is no folder; download hunyuanvideo-community/HunyuanVideo and give its folder"
        )


def _check_components(folder: Path) -> None:
    missing = [name for name in COMPONENTS if not is_complete(folder / name, name)]
    if missing:
        raise ConfigError(
            f"HunyuanVideo consists of {', '.join(COMPONENTS)}, but {folder} lacks files of {', '.join(missing)}; "
            "complete the download"
        )


def load_pipeline(source: HunyuanSource, *, dtype: torch.dtype) -> "HunyuanVideoPipeline":
    """Load all components on the CPU, without network and without progress bars.

    Raises:
        ConfigError: If a file cannot be read as what it should be.
        LayerMatchError: If an original checkpoint holds tensors that HunyuanVideo has not.
    """
    from diffusers import HunyuanVideoPipeline
    from safetensors import SafetensorError

    import hyquant.models.pca_codec  # noqa: F401  (diffusers loads classes of ours only from modules already imported)

    load_dtype = torch.float32 if source.has_outliers else dtype  # outlier factors are exact in float32
    logger.info("load hunyuan_video folder=%s dtype=%s", source.folder, dtype)
    try:
        with quiet():
            if source.original is not None:
                parts = load_components(source.original, dtype=load_dtype, load_key=source.load_key)
                pipe = HunyuanVideoPipeline(**parts)
            else:
                pipe = HunyuanVideoPipeline.from_pretrained(str(source.folder), dtype=load_dtype, local_files_only=True)
    except HyquantError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{source.folder} must load as a HunyuanVideoPipeline, but it does not: {error}") from error
    except UnpicklingError as error:
        raise ConfigError(
            f"weights must be tensors only, but a file in {source.folder} has something else or is damaged; download "
            "it again from its publisher"
        ) from error
    if source.has_outliers:
        from hyquant.models import mini
        from hyquant.models.mini.outliers import apply_outliers_, load_outliers

        apply_outliers_(pipe.transformer, load_outliers(mini.OUTLIERS))
        with quiet():
            pipe.to(dtype)
    if source.flow_shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=source.flow_shift)
    return pipe


@contextmanager
def quiet() -> Iterator[None]:
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
