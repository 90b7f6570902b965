"""The mini model in Tencent's layout, and back through the adapter."""

import json
import shutil
import sys

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

from hyquant.errors import ConfigError
from hyquant.models import load_model
from hyquant.models.base import RenderSettings
from hyquant.models.hunyuan_folder import find_source
from hyquant.models.hunyuan_video import load_hunyuan_video
from tools.export_original_layout import export_original, main, write_vae

SETTINGS = RenderSettings(height=48, width=48, num_frames=5, num_steps=2)
PROMPT = "a red square moving left on a black background"
STATES = "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "ckpts"
    export_original("mini", folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(exported, tmp_path / "ckpts")


def test_the_mini_model_comes_back_with_equal_weights_and_renders_the_same(exported):
    expected, actual = (load_model("hunyuan_video", source, device="cpu") for source in ("mini", str(exported)))
    ours, theirs = actual.denoiser.state_dict(), expected.denoiser.state_dict()

    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert actual.fingerprint() == expected.fingerprint()  # codec, encoders, schedule and template included
    (one,), (other,) = (model.render([PROMPT], [1], SETTINGS) for model in (actual, expected))
    assert torch.equal(one, other)


def test_the_transformer_is_written_as_published(exported):
    content = torch.load(exported / STATES, weights_only=True)

    assert list(content) == ["module"]
    assert content["module"]["double_blocks.0.img_attn_qkv.weight"].shape == (768, 256)
    assert content["module"]["single_blocks.3.linear1.weight"].shape == (1792, 256)
    assert not any("transformer_blocks" in name or ".attn." in name for name in content["module"])


def test_averaged_weights_load_by_their_key(folder):
    content = torch.load(folder / STATES, weights_only=True)["module"]
    torch.save({"module": content, "ema": {name: tensor * 2 for name, tensor in content.items()}}, folder / STATES)
    arguments = {"device": torch.device("cpu"), "dtype": torch.float32}

    plain, averaged = (load_hunyuan_video(str(folder), load_key=key, **arguments) for key in ("module", "ema"))

    assert torch.equal(averaged.denoiser.proj_out.weight, 2 * plain.denoiser.proj_out.weight)


def test_the_folder_of_one_resolution_finds_the_text_encoders_beside_it(exported):
    found = find_source(str(exported / "hunyuan-video-t2v-720p")).original

    assert found is not None
    assert found.text_encoder == exported / "text_encoder"
    assert found.vae == exported / "hunyuan-video-t2v-720p" / "vae"


def test_tokenizers_may_lie_with_their_encoders_as_published(folder):
    """Published checkpoints have no tokenizer folders, no scheduler and no template."""
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, folder / name.replace("tokenizer", "text_encoder"), dirs_exist_ok=True)
        shutil.rmtree(folder / name)
    shutil.rmtree(folder / "scheduler")
    (folder / "prompt_template.json").unlink()

    source = find_source(str(folder))
    model = load_model("hunyuan_video", str(folder), device="cpu")

    assert source.original.tokenizer_2 == folder / "text_encoder_2"
    assert source.prompt_template is None
    assert source.max_sequence_length == 256
    assert model._pipe.scheduler.config.shift == 7.0


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (STATES, r"\*_model_states\.pt, .*transformers is none; complete the download"),
        ("hunyuan-video-t2v-720p/vae/config.json", "the autoencoder must come with config.json"),
        ("text_encoder/model.safetensors", "lacks files of text_encoder;"),
        ("tokenizer/tokenizer_config.json", "lacks files of tokenizer;"),
        ("text_encoder_2/config.json", "lacks files of text_encoder_2;"),
    ],
)
def test_what_is_missing_is_named(folder, lost, message):
    (folder / lost).unlink()

    with pytest.raises(ConfigError, match=message):
        find_source(str(folder))


def test_of_two_resolutions_none_is_guessed(folder):
    shutil.copytree(folder / "hunyuan-video-t2v-720p", folder / "hunyuan-video-t2v-540p")

    with pytest.raises(
        ConfigError, match="holds hunyuan-video-t2v-540p, hunyuan-video-t2v-720p; give the folder of one"
    ):
        find_source(str(folder))
    assert find_source(str(folder / "hunyuan-video-t2v-540p")).original.text_encoder == folder / "text_encoder"


def test_a_template_that_is_incomplete_is_refused(folder):
    (folder / "prompt_template.json").write_text('{"template": "{}"}')

    with pytest.raises(ConfigError, match=r"must hold template \(text\), crop_start and max_sequence_length"):
        find_source(str(folder))


def test_hunyuanvideos_own_autoencoder_is_written_under_its_original_class(tmp_path):
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )

    write_vae(vae, tmp_path / "vae")

    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKLCausal3D"
    assert config["down_block_types"] == ["DownEncoderBlockCausal3D"] * 4
    assert (tmp_path / "vae" / "pytorch_model.pt").is_file()


def test_the_command_refuses_a_folder_that_is_in_use_in_one_sentence(exported, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--source", "mini", "--out", str(exported)])

    with pytest.raises(SystemExit) as caught:
        main()

    assert caught.value.code == 1
    assert "the output must be a new folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is in the original one already"):
        export_original(str(exported), exported.parent / "again")
