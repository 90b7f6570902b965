"""LPIPS, DISTS and DINO distance against their papers' formulas, with random weights and without a connection."""

import hashlib
import logging
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchmetrics
import torchvision
from safetensors.torch import save_file

from metrics import dino_distance, lpips, published
from metrics.base import Sample
from metrics.errors import MetricError, WeightsMissing
from metrics.registry import METRICS
from tests.toys.published_weights import put_random_weights, use_caches_in

NETWORKS = ("lpips", "dists", "dino_distance")
SHIPPED = Path(torchmetrics.functional.image.__file__).parent


def pair(frames: int = 3, side: int = 48) -> Sample:
    generator = torch.Generator().manual_seed(5)
    reference = torch.rand(frames, 3, side, side, generator=generator)
    return Sample("", (reference + 0.2 * torch.rand(reference.shape, generator=generator)).clamp(0, 1), reference)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as monkeypatch:
        put_random_weights(folder, monkeypatch)
        yield folder / "torch" / "hub" / "checkpoints"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a metric must not open a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def stages(images, features, cuts, before=()):
    """Run the layers of a network, and return what leaves the layers in `cuts`."""
    found = []
    for index, layer in enumerate(features):
        images = before[index](images) if index in before else layer(images)
        if index in cuts:
            found.append(images.clone())
    return found


@torch.no_grad()
def test_lpips_is_the_formula_of_its_paper(weights, embedder):
    """Equation 1: squared differences of unit features, weighted by the heads, mean over places, sum over layers."""
    network = torchvision.models.alexnet(weights=None).features
    state = torch.load(weights / Path(lpips.ALEXNET_URL).name)
    network.load_state_dict({name.removeprefix("features."): w for name, w in state.items() if "features" in name})
    heads = torch.load(SHIPPED / "lpips_models" / "alex.pth", map_location="cpu")
    sample = pair()
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    images = [((2 * v - 1) - shift[:, None, None]) / scale[:, None, None] for v in (sample.video, sample.reference)]
    layers = zip(*(stages(x, network[:12], {1, 4, 7, 9, 11}) for x in images), strict=True)
    per_frame = torch.zeros(3)
    for index, (a, b) in enumerate(layers):
        gap = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
        per_frame += (gap * heads[f"lin{index}.model.1.weight"]).sum(dim=1).mean(dim=(1, 2))

    assert METRICS["lpips"].function(sample, embedder) == pytest.approx(float(per_frame.mean()), rel=1e-4)


@torch.no_grad()
def test_dists_is_the_formula_of_its_paper(weights, embedder):
    """Equation 6: means (texture) and covariances (structure) of every map, the image itself among them."""
    with torch.device("meta"):
        network = torchvision.models.vgg16(weights=None).features
    state = torch.load(weights / "vgg16-397923af.pth")
    state = {name.removeprefix("features."): w for name, w in state.items() if "features" in name}
    network.load_state_dict(state, assign=True)
    terms = torch.load(SHIPPED / "dists_models" / "weights.pt")
    sample = pair(frames=1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (sample.video, sample.reference)
    normal = [(x - mean[:, None, None]) / std[:, None, None] for x in images]
    pools = dict.fromkeys((4, 9, 16, 23), root_of_pooled_squares)
    maps = [[x, *stages(n, network[:30], {3, 8, 15, 22, 29}, pools)] for x, n in zip(images, normal, strict=True)]
    a, b = maps
    likeness, at = 0.0, 0
    alpha, beta = terms["alpha"].flatten().double().numpy(), terms["beta"].flatten().double().numpy()
    for x, y in zip(a, b, strict=True):
        for u, v in zip(x[0].double().numpy(), y[0].double().numpy(), strict=True):
            texture = (2 * u.mean() * v.mean() + 1e-6) / (u.mean() ** 2 + v.mean() ** 2 + 1e-6)
            covariance = ((u - u.mean()) * (v - v.mean())).mean()
            structure = (2 * covariance + 1e-6) / (u.var() + v.var() + 1e-6)
            likeness += alpha[at] * texture + beta[at] * structure
            at += 1

    expected = 1 - likeness / (alpha.sum() + beta.sum())
    assert METRICS["dists"].function(sample, embedder) == pytest.approx(expected, abs=1e-4)  # float32 covariances


def root_of_pooled_squares(maps):
    """Section 3.1 of the paper: an l2 pooling with a Hanning window of three taps, every second pixel."""
    taps = torch.tensor([0.25, 0.5, 0.25])
    window = (taps[:, None] * taps).expand(maps.shape[1], 1, 3, 3)
    return F.conv2d(maps.square(), window, stride=2, padding=1, groups=maps.shape[1]).add(1e-12).sqrt()


def test_dino_distance_of_known_embeddings(monkeypatch, weights, embedder):
    """Embeddings at right angles in one frame of two."""
    answers = iter([torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])])
    monkeypatch.setattr(dino_distance, "_network", lambda path: lambda frames: next(answers))

    assert METRICS["dino_distance"].function(pair(frames=2), embedder) == pytest.approx(0.5)


def test_the_published_model_of_dino_distance_loads_from_its_file(tmp_path, monkeypatch, no_network, embedder):
    """Weights of the published size, whose positions timm resamples from 518 to 224 pixels."""
    use_caches_in(tmp_path, monkeypatch)
    monkeypatch.setattr(dino_distance, "require_published", lambda metric, path: None)
    repository = tmp_path / "hub" / f"models--timm--{dino_distance.MODEL}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    (repository / "snapshots" / ("1" * 40)).mkdir(parents=True)
    with torch.device("meta"):
        model = timm.create_model(dino_distance.MODEL, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.02 * torch.randn(w.shape, generator=generator) for name, w in model.state_dict().items()}
    save_file(state, repository / "snapshots" / ("1" * 40) / dino_distance.WEIGHTS_FILE)

    assert 0.0 < METRICS["dino_distance"].function(pair(frames=1), embedder) < 2.0


@pytest.mark.parametrize("name", NETWORKS)
def test_absent_weights_are_a_sentence_that_says_where_they_go(name, tmp_path, monkeypatch, no_network, embedder):
    use_caches_in(tmp_path, monkeypatch)

    with pytest.raises(
        WeightsMissing, match=rf"weights of {name} must be .*, but are not; (download https://|run `hf)"
    ):
        METRICS[name].function(pair(), embedder)
    with pytest.raises(WeightsMissing):
        METRICS[name].find_weights()
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_are_there_are_used_without_a_connection(name, weights, no_network, embedder):
    assert METRICS[name].function(pair(frames=1), embedder) > 0.0


@pytest.mark.parametrize(("name", "side"), [("lpips", 30), ("dists", 15), ("ms_ssim", 175), ("warping_error", 15)])
def test_frames_that_are_too_small_are_refused(name, side, weights, embedder):
    spec = METRICS[name]

    with pytest.raises(MetricError, match=rf"{name} needs frames of at least {side + 1} pixels a side, but got {side}"):
        spec.function(pair(side=side), embedder)
    assert np.isfinite(spec.function(pair(frames=2, side=side + 1), embedder))


def test_the_digest_in_a_files_name_is_compared(tmp_path, caplog):
    digest = hashlib.sha256(b"weights").hexdigest()
    right, wrong = tmp_path / f"net-{digest[:8]}.pth", tmp_path / "net-0123abcd.pth"
    blob = tmp_path / digest
    for path in (right, wrong, blob):
        path.write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)

    with caplog.at_level(logging.INFO):
        published.require_published("lpips", right)
        published.require_published("lpips", link)
    with pytest.raises(WeightsMissing, match=f"sha256 that begins with 0123abcd, but .*{digest}; download"):
        published.require_published("lpips", wrong)
    blob.write_bytes(b"damaged")
    published.require_published.cache_clear()
    with pytest.raises(WeightsMissing, match=digest):
        published.require_published("lpips", link)
    assert caplog.text.count(f"sha256={digest}") == 2


def test_lpips_checks_the_digest_of_what_it_loads(tmp_path, monkeypatch, embedder):
    use_caches_in(tmp_path, monkeypatch)
    monkeypatch.setattr(lpips, "require_published", published.require_published)
    path = tmp_path / "torch" / "hub" / "checkpoints" / Path(lpips.ALEXNET_URL).name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not AlexNet")

    with pytest.raises(WeightsMissing, match="must have the sha256 that begins with 7be5be79"):
        METRICS["lpips"].function(pair(), embedder)
