"""The open_clip path, on a tiny random model saved and loaded exactly as published ones are."""

import json
import socket

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from metrics.embedders import find_weights, load_embedder
from metrics.errors import EmbedderMissing
from metrics.hashing import HashingEmbedder

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PROMPTS = ["a red square moving right", "a blue circle"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"nothing may be downloaded, but {args} was dialled")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def tiny_model():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return open_clip.CLIP(**TINY, output_dict=False).eval()


@pytest.fixture
def tiny_folder(tiny_model, tmp_path):
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess}))
    save_file(tiny_model.state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


@pytest.fixture
def square_video(draw_video):
    return (draw_video(side=32, frames=5) * 255).round() / 255  # what an image file can hold


def embed_by_image_files(model, video, *, size=32):
    """Embed frame by frame from 8-bit images, written out with PIL and numpy."""
    embedded = []
    for frame in video:
        pixels = (frame.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        image = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        normalized = (image / 255 - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
        with torch.no_grad():
            features = model.encode_image(torch.from_numpy(normalized).permute(2, 0, 1)[None])[0]
        embedded.append(features / features.norm())
    return torch.stack(embedded)


def test_a_folder_embeds_as_its_model_does_on_image_files(tiny_folder, tiny_model, square_video):
    embedder = load_embedder(str(tiny_folder))

    views = embedder.embed_video(square_video)

    assert views.shape == (5, 8)
    torch.testing.assert_close(views, embed_by_image_files(tiny_model, square_video), atol=1e-5, rtol=0)


def test_resizing_agrees_with_image_files_to_their_rounding(tiny_folder, tiny_model, draw_video):
    video = (draw_video(side=48, frames=3) * 255).round() / 255
    views = load_embedder(str(tiny_folder)).embed_video(video)

    cosine = (views * embed_by_image_files(tiny_model, video)).sum(dim=1)

    assert cosine.min() > 0.999  # PIL rounds and clamps to 8 bits after resizing


def test_prompts_embed_as_with_open_clip_itself(tiny_folder, tiny_model):
    tokens = open_clip.SimpleTokenizer(context_length=16)(PROMPTS)
    with torch.no_grad():
        features = tiny_model.encode_text(tokens)

    embedded = load_embedder(str(tiny_folder)).embed_prompts(PROMPTS)

    torch.testing.assert_close(embedded, features / features.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


def test_many_frames_embed_as_each_alone(tiny_folder):
    """More frames than go through the tower at once."""
    video = torch.rand(70, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    embedder = load_embedder(str(tiny_folder))

    alone = torch.cat([embedder.embed_video(frame[None]) for frame in video[[0, 63, 64, 69]]])

    torch.testing.assert_close(embedder.embed_video(video)[[0, 63, 64, 69]], alone, atol=1e-5, rtol=0)


def test_grid_gives_one_unit_vector_of_four_tiled_frames(tiny_folder, tiny_model, square_video):
    """16 x 16 frames make a 32 x 32 grid, which needs no resizing."""
    video = square_video[:, :, ::2, ::2]
    tiles = torch.cat((torch.cat((video[0], video[1]), dim=2), torch.cat((video[3], video[4]), dim=2)), dim=1)

    views = load_embedder(str(tiny_folder), view="grid").embed_video(video)

    torch.testing.assert_close(views, embed_by_image_files(tiny_model, tiles[None]), atol=1e-5, rtol=0)


def test_an_architecture_with_a_weights_file_equals_the_folder(tiny_folder, tmp_path, square_video, monkeypatch):
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"tiny-vit": TINY})
    monkeypatch.setattr(open_clip.factory, "list_models", lambda: ["tiny-vit"])
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny-vit"])

    embedder = load_embedder("tiny-vit", str(tiny_folder / "open_clip_model.safetensors"))

    same_text = load_embedder(str(tiny_folder)).embed_prompts(PROMPTS)
    torch.testing.assert_close(embedder.embed_prompts(PROMPTS), same_text)
    assert embedder.embed_video(square_video).shape == (5, 8)


def test_hashing_needs_no_weights(square_video):
    embedder = load_embedder("hashing", view="grid")

    assert isinstance(embedder, HashingEmbedder)
    assert embedder.embed_video(square_video).shape == (1, 64)


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ("open_clip_config.json", "open_clip_config.json"),
        ("open_clip_model.safetensors", "open_clip_model.safetensors"),
    ],
)
def test_a_folder_without_a_file_says_which(tiny_folder, left_out, named):
    (tiny_folder / left_out).unlink()

    with pytest.raises(EmbedderMissing, match=f"must hold {named}, but .* does not"):
        load_embedder(str(tiny_folder))


def test_a_missing_folder_is_one_sentence():
    with pytest.raises(EmbedderMissing, match=r"must hold .* but no/such/folder does not"):
        load_embedder("no/such/folder")


def test_weights_that_do_not_fit_are_one_sentence(tiny_folder):
    save_file({"visual.proj": torch.zeros(2, 2)}, tiny_folder / "open_clip_model.safetensors")

    with pytest.raises(EmbedderMissing, match="cannot be loaded"):
        load_embedder(str(tiny_folder))


def test_an_unknown_architecture_names_the_closest():
    with pytest.raises(EmbedderMissing, match=r"got 'ViT-L14'; did you mean 'ViT-L-14'\?"):
        load_embedder("ViT-L14", "laion2b_s32b_b82k")


def test_an_unknown_tag_names_the_known_ones():
    with pytest.raises(
        EmbedderMissing, match=r"laion2b_s32b_b82k.* got 'laion2b_s32b'; did you mean 'laion2b_s32b_b82k'\?"
    ):
        load_embedder("ViT-L-14", "laion2b_s32b")


def test_an_architecture_without_weights_lists_tags():
    with pytest.raises(EmbedderMissing, match=r"judge ViT-L-14 needs pretrained weights; .*laion2b_s32b_b82k"):
        load_embedder("ViT-L-14")


def test_published_weights_are_found_in_the_cache_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(
        EmbedderMissing, match=r"hf download laion/CLIP-ViT-L-14-laion2B-s32B-b82K open_clip_model\.safe"
    ):
        find_weights("ViT-L-14", "laion2b_s32b_b82k")

    repository = tmp_path / "models--laion--CLIP-ViT-L-14-laion2B-s32B-b82K"
    weights = repository / "snapshots" / ("0" * 40) / "open_clip_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)

    assert find_weights("ViT-L-14", "laion2b_s32b_b82k") == weights


def test_a_truncated_file_is_one_sentence(tiny_folder):
    weights = tiny_folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(EmbedderMissing, match="cannot be loaded"):
        load_embedder(str(tiny_folder))
