"""Models that put videos and prompts into one space, and how they are found: the only importer of open_clip.

`load_embedder` takes the judge as a study names it:

    model="mini"                              the judge shipped in metrics/mini_judge
    model="path/to/folder"                    any folder that open_clip saved (open_clip_config.json and weights)
    model="ViT-L-14", pretrained="laion2b_s32b_b82k"   a published pair, or pretrained="path/to/weights"
    model="hashing"                           no weights at all, see metrics.hashing

The first two are the same code path. Nothing is ever downloaded: published weights must already be in the local cache.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor

from metrics.errors import EmbedderMissing, did_you_mean
from metrics.hashing import HashingEmbedder
from metrics.published import cached_file
from metrics.views import VIEWS, ViewName

CONFIG_FILE = "open_clip_config.json"
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_BATCH = 64  # images per pass through the tower


class Embedder(Protocol):
    """Turns videos and prompts into unit vectors of one space."""

    def embed_video(self, video: Tensor) -> Tensor:
        """Return [V, E] float32 unit vectors, one per view of a [T, C, H, W] video in [0, 1]."""
        ...

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Return [P, E] float32 unit vectors, one per prompt."""
        ...


@dataclass(frozen=True)
class OpenClipEmbedder:
    """An open_clip model with its own preprocessing and tokenizer; results are on the CPU."""

    model: Any
    preprocess: Callable[[Tensor], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    view: ViewName
    device: torch.device

    @torch.inference_mode()
    def embed_video(self, video: Tensor) -> Tensor:
        """Return [V, E] float32 unit vectors of the views of a [T, 3, H, W] video in [0, 1]."""
        batches = torch.split(VIEWS[self.view](video.float()), _BATCH)
        embedded = [self.model.encode_image(self._images(batch), normalize=True).float().cpu() for batch in batches]
        return torch.cat(embedded)

    @torch.inference_mode()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Return [P, E] float32 unit vectors; the tokenizer cuts prompts at the model's context length."""
        tokens = self.tokenizer(prompts).to(self.device)
        embedded: Tensor = self.model.encode_text(tokens, normalize=True).float().cpu()
        return embedded

    def _images(self, views: Tensor) -> Tensor:
        return self.preprocess(views.to(self.device))


def load_embedder(
    model: str, pretrained: str | None = None, *, view: ViewName = "frames", device: str | torch.device = "cpu"
) -> Embedder:
    """Load the judge of a study; see the module's first lines for what may be named.

    Args:
        model: Shipped name, folder, or open_clip architecture.
        pretrained: Weights tag or file of an architecture; None for everything else.
        view: What the model gets to see of a video.
        device: Where the towers run.

    Raises:
        EmbedderMissing: If model or weights are unknown or not on this machine; the message says where to put them.
    """
    if model == "hashing":
        return HashingEmbedder(view=view)
    weights = find_weights(model, pretrained)
    device = torch.device(device)
    if weights.is_dir():
        return _load_folder(weights, view, device)
    return _load_published(model, pretrained, weights, view, device)


def find_weights(model: str, pretrained: str | None = None) -> Path:
    """Return the folder or file with a model's weights, without loading or downloading anything.

    Raises:
        EmbedderMissing: If they are unknown or not on this machine.
    """
    if model == "mini":
        return _checked_folder(Path(str(files("metrics").joinpath("mini_judge"))), "reinstall hyq-search")
    if os.sep in model or Path(model).is_dir():
        return _checked_folder(Path(model), "save a model there with open_clip's push_to_hf_hub.save_for_hf")
    return _published_weights(model, pretrained)


def _checked_folder(folder: Path, way_out: str) -> Path:
    has_weights = any(any(folder.glob(f"*.{suffix}")) for suffix in ("safetensors", "bin", "pth"))
    found = {CONFIG_FILE: (folder / CONFIG_FILE).is_file(), _HUB_FILES[0]: has_weights}
    missing = [name for name, is_there in found.items() if not is_there]
    if missing:
        raise EmbedderMissing(f"a judge's folder must hold {' and '.join(missing)}, but {folder} does not; {way_out}")
    return folder


def _published_weights(model: str, pretrained: str | None) -> Path:
    import open_clip

    architectures = tuple(open_clip.list_models())
    if model not in architectures:
        raise EmbedderMissing(
            f"a judge is 'mini', a folder or one of open_clip's {len(architectures)} architectures, but got {model!r}"
            f"{did_you_mean(model, ('mini', *architectures))}"
        )
    tags = tuple(open_clip.list_pretrained_tags_by_model(model))
    if pretrained is None:
        raise EmbedderMissing(f"judge {model} needs pretrained weights; name a file or one of {', '.join(tags)}")
    if Path(pretrained).is_file():
        return Path(pretrained)
    source = open_clip.get_pretrained_cfg(model, pretrained)
    if not source:
        raise EmbedderMissing(
            f"pretrained of judge {model} must be a file or one of {', '.join(tags)}, but got {pretrained!r}"
            f"{did_you_mean(pretrained, tags)}"
        )
    return _cached_weights(source, f"{model}/{pretrained}")


def _cached_weights(source: dict[str, Any], label: str) -> Path:
    """Return the cached file of a published pair: the Hugging Face cache if the pair is there, else open_clip's own."""
    repository, file_name = os.path.split(source["hf_hub"])
    if not repository:
        url: str = source["url"]
        cached = Path("~/.cache/clip").expanduser() / os.path.basename(url)
        if cached.is_file():
            return cached
        raise EmbedderMissing(
            f"weights of judge {label} must be at {cached}, but are not; download {url} to that place"
        )
    for name in (file_name,) if file_name else _HUB_FILES:
        if (found := cached_file(repository, name)) is not None:
            return found
    raise EmbedderMissing(
        f"weights of judge {label} must be in the Hugging Face cache, but are not; "
        f"run `hf download {repository} {file_name or _HUB_FILES[0]}` once, or name a folder or file that has them"
    )


def _load_folder(folder: Path, view: ViewName, device: torch.device) -> OpenClipEmbedder:
    import open_clip

    name = f"local-dir:{folder}"
    with _explained(str(folder)):
        model = open_clip.create_model_from_pretrained(name, device=device, return_transform=False)
        tokenizer = open_clip.get_tokenizer(name)
    return OpenClipEmbedder(model.eval(), _preprocessing(model), tokenizer, view, device)


def _load_published(
    architecture: str, pretrained: str | None, weights: Path, view: ViewName, device: torch.device
) -> OpenClipEmbedder:
    """Load from the file, so that open_clip asks no server, with the preprocessing its own table has for the tag."""
    import open_clip

    source = open_clip.get_pretrained_cfg(architecture, pretrained)
    text = open_clip.get_model_config(architecture)["text_cfg"]
    offline = {"local_files_only": True} if "hf_tokenizer_name" in text else {}
    with _explained(f"{architecture}/{pretrained}"):
        model = open_clip.create_model_from_pretrained(
            architecture,
            str(weights),
            device=device,
            force_quick_gelu=source.get("quick_gelu", False),
            image_mean=source.get("mean"),
            image_std=source.get("std"),
            image_interpolation=source.get("interpolation"),
            image_resize_mode=source.get("resize_mode"),
            return_transform=False,
        )
        tokenizer = open_clip.get_tokenizer(architecture, **offline)
    return OpenClipEmbedder(model.eval(), _preprocessing(model), tokenizer, view, device)


@contextlib.contextmanager
def _explained(judge: str) -> Iterator[None]:
    """Turn what open_clip raises on broken or unfit files into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as error:
        cause = str(error).strip().splitlines()[0]
        raise EmbedderMissing(f"judge {judge} cannot be loaded: {cause}; install its files again") from error


def _preprocessing(model: Any) -> Callable[[Tensor], Tensor]:
    """Return open_clip's own resize, crop and normalisation of the model, applied to [V, 3, H, W] tensors."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(**model.visual.preprocess_cfg)
    if config.resize_mode == "longest":
        raise EmbedderMissing(
            "a judge's resize_mode must be 'shortest' or 'squash', but is 'longest', which open_clip has for image "
            f"files only; change preprocess_cfg in {CONFIG_FILE}"
        )
    transform: Callable[[Tensor], Tensor] = image_transform_v2(config, is_train=False)
    return transform
