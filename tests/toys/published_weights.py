"""Random weights in the places of the published ones, so that metrics with networks run without a download.

The files have the names and layouts of the published ones but not their digests, whose check is left out.
"""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from metrics import dino_distance, dists, lpips

Folders = tuple[Path, Path]


def put_random_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill a folder as torch.hub and the Hugging Face cache would, and make them look there."""
    use_caches_in(folder, monkeypatch)
    for name, url, build in (
        ("lpips", lpips.ALEXNET_URL, torchvision.models.alexnet),
        ("dists", dists.VGG_URL, torchvision.models.vgg16),
    ):
        path = folder / "torch" / "hub" / "checkpoints" / Path(url).name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_random_state(build), path)
        monkeypatch.setattr(f"metrics.{name}.require_published", _accept)
    snapshot = _snapshot(folder)
    snapshot.mkdir(parents=True)
    torch.manual_seed(0)  # timm draws from the global generator
    model = timm.create_model("test_vit.r160_in1k", num_classes=0, img_size=32)
    save_file(model.state_dict(), snapshot / dino_distance.WEIGHTS_FILE)
    monkeypatch.setattr(dino_distance, "require_published", _accept)
    monkeypatch.setattr(dino_distance, "MODEL", "test_vit.r160_in1k")
    monkeypatch.setattr(dino_distance, "SIDE", 32)


def use_caches_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.hub and huggingface_hub look into a folder."""
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))


def _snapshot(folder: Path) -> Path:
    repository = folder / "hub" / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def _random_state(build: Callable[..., nn.Module]) -> dict[str, Tensor]:
    """Return random features; the large matrices of the classifier, which no metric reads, are zeros of one element."""
    with torch.device("meta"):
        shapes = build(weights=None).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(meta.shape, generator=generator) * (2 / meta[0].numel()) ** 0.5
        if name.startswith("features")
        else torch.zeros(1).expand(meta.shape)
        for name, meta in shapes.items()
    }


def _accept(metric: str, path: Path) -> None:
    """Accept any digest."""
