"""Original checkpoints: every published form is read, nothing in them is run, and what is wrong is one sentence."""

import json
import os
import pickle

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import save_file

from hyquant.errors import ConfigError, LayerMatchError
from hyquant.models.checkpoints import read_checkpoint
from hyquant.models.fingerprint import plain_config
from hyquant.models.original_folder import denoiser_config, load_denoiser, load_vae
from hyquant.models.original_vae import (
    vae_config_to_diffusers,
    vae_config_to_original,
    vae_to_diffusers,
    vae_to_original,
)
from tests.toys.original_dit import ToySize, random_toy, toy_inputs

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


def is_state(found, state=STATE) -> bool:
    return found.keys() == state.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in state.items()
    )


def write_deepspeed(folder):
    torch.save({"module": STATE, "ema": OTHER, "step": 7}, folder / "mp_rank_00_model_states.pt")
    torch.save({"broken": 1}, folder / "mp_rank_00_model_states_fp8.pt")  # published beside it, and not meant


def write_bare(folder):
    torch.save(STATE, folder / "pytorch_model_module.pt")
    torch.save(OTHER, folder / "pytorch_model_ema.pt")


def write_shards(folder):
    for index, (name, tensor) in enumerate(STATE.items()):
        save_file({name: tensor}, folder / f"model-{index}.safetensors")


@pytest.mark.parametrize("write", [write_deepspeed, write_bare, write_shards], ids=lambda f: f.__name__)
def test_every_kind_of_folder_is_read(tmp_path, write):
    write(tmp_path)

    assert is_state(read_checkpoint(tmp_path))


@pytest.mark.parametrize("write", [write_deepspeed, write_bare], ids=lambda f: f.__name__)
def test_the_load_key_chooses_the_weights(tmp_path, write):
    write(tmp_path)

    assert is_state(read_checkpoint(tmp_path, load_key="ema"), OTHER)


@pytest.mark.parametrize(
    "content",
    [STATE, {"module": STATE}, {"module": STATE, "lr": 0.1}, {"state_dict": STATE}],
    ids=["plain", "module", "training", "state_dict"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_kind_of_file_is_read(tmp_path, content, zipped):
    path = tmp_path / "weights.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)

    assert is_state(read_checkpoint(path))


def test_a_missing_load_key_lists_what_there_is(tmp_path):
    torch.save({"module": STATE, "step": 3}, tmp_path / "x.pt")

    with pytest.raises(ConfigError, match=r"under load_key 'ema', but .* has module, step; give one of its keys"):
        read_checkpoint(tmp_path / "x.pt", load_key="ema")


class Bomb:
    """Unpickles by making a folder: harmless here, any command elsewhere."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["plain pickle", "zip", "legacy"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, form):
    target, path = tmp_path / "it-ran", tmp_path / "mp_rank_00_model_states.pt"
    content = {"module": {**STATE, "bomb": Bomb(target)}}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"bomb": Bomb(target)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")

    with pytest.raises(ConfigError, match=r"damaged or holds code, which is not run; download it again") as caught:
        read_checkpoint(tmp_path)

    assert not target.exists()
    assert "weights_only" not in str(caught.value)  # torch's message says how to run it; ours must not
    assert len(str(caught.value).splitlines()) == 1
    if form != "plain pickle":
        torch.load(path, weights_only=False)
        assert target.exists()  # the bomb works, so its silence above means something


@pytest.mark.parametrize("payload", [b"", b"not a checkpoint", b"PK\x03\x04 cut", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_damaged_file_is_one_sentence(tmp_path, name, payload):
    (tmp_path / name).write_bytes(payload)

    with pytest.raises(ConfigError, match=r"a checkpoint must hold tensors") as caught:
        read_checkpoint(tmp_path / name)

    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [[1, 2], {}, {"module": {}}, {"module": {"x": 1}}, {1: torch.ones(1)}])
def test_what_holds_no_tensors_by_name_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")

    with pytest.raises(ConfigError, match="a checkpoint must hold tensors by name"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_folder_without_a_checkpoint_says_what_it_looks_for(tmp_path):
    with pytest.raises(ConfigError, match=r"\*_model_states\.pt, pytorch_model_ema\.pt, pytorch_model\.pt or"):
        read_checkpoint(tmp_path, load_key="ema")


def test_of_two_checkpoints_none_is_guessed(tmp_path):
    for rank in (0, 1):
        torch.save(STATE, tmp_path / f"mp_rank_0{rank}_model_states.pt")

    with pytest.raises(ConfigError, match=r"must hold one .*mp_rank_00_model_states\.pt, mp_rank_01_model_states\.pt"):
        read_checkpoint(tmp_path)


def test_an_original_denoiser_loads_as_diffusers_class_and_computes_the_same(tmp_path):
    toy = random_toy(0, ToySize())
    torch.save({"module": toy.state_dict()}, tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "config.json").write_text('{"rope_dim_list": [8, 12, 12]}')
    inputs = toy_inputs(ToySize(), seed=3)

    denoiser = load_denoiser(tmp_path, dtype=torch.float32)
    actual = denoiser(
        hidden_states=inputs["x"],
        timestep=inputs["t"],
        encoder_hidden_states=inputs["text_states"],
        encoder_attention_mask=inputs["text_mask"],
        pooled_projections=inputs["text_states_2"],
        guidance=inputs["guidance"],
    ).sample

    expected = toy(**inputs)["x"]
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-5
    assert not denoiser.training
    assert {p.dtype for p in load_denoiser(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_the_published_sizes_are_read_from_the_weights():
    """Shapes of the 13B model's table of layers; the head size alone says how its rotary embedding is split."""
    shapes = {
        "img_in.proj.weight": (3072, 16, 1, 2, 2),
        "double_blocks.0.img_mlp.fc1.weight": (12288, 3072),
        "double_blocks.0.img_attn_q_norm.weight": (128,),
        "final_layer.linear.weight": (64, 3072),
        "txt_in.input_embedder.weight": (3072, 4096),
        "vector_in.in_layer.weight": (3072, 768),
        "guidance_in.mlp.0.weight": (3072, 256),
        **{f"double_blocks.{index}.img_mod.linear.bias": (1,) for index in range(20)},
        **{f"single_blocks.{index}.linear1.bias": (1,) for index in range(40)},
        **{f"txt_in.individual_token_refiner.blocks.{index}.norm1.bias": (1,) for index in range(2)},
    }

    config = denoiser_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, {})

    assert config == {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "rope_axes_dim": [16, 56, 56],
    }


@pytest.mark.parametrize(
    "extra", [{}, {"rope_dim_list": [8, 12]}, {"rope_dim_list": "8,12,12"}, {"rope_dim_list": [32]}]
)
def test_an_unknown_split_of_the_rotary_embedding_is_asked_for(extra):
    with pytest.raises(ConfigError, match=r"must split a head's 32 channels .* give it in config\.json"):
        denoiser_config(random_toy(0, ToySize()).state_dict(), extra)


def test_weights_that_do_not_fit_together_are_refused(tmp_path):
    state = random_toy(0, ToySize()).state_dict()
    (tmp_path / "config.json").write_text('{"rope_dim_list": [8, 12, 12]}')
    missing = {name: tensor for name, tensor in state.items() if name != "double_blocks.1.txt_mlp.fc2.bias"}
    odd = state | {"single_blocks.0.linear2.weight": torch.zeros(1, 1)}

    for broken in (missing, odd):
        torch.save(broken, tmp_path / "pytorch_model.pt")
        with pytest.raises(ConfigError, match="must hold weights that fit together"):
            load_denoiser(tmp_path, dtype=torch.float32)
    torch.save(state | {"lora.weight": torch.zeros(1)}, tmp_path / "pytorch_model.pt")
    with pytest.raises(LayerMatchError, match="lora"):
        load_denoiser(tmp_path, dtype=torch.float32)
    torch.save(STATE, tmp_path / "pytorch_model.pt")
    with pytest.raises(ConfigError, match=r"must hold img_in\.proj\.weight, but it is not there"):
        load_denoiser(tmp_path, dtype=torch.float32)


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
        ).eval()


def test_the_autoencoders_names_survive_both_ways(vae):
    """The original's names are those of diffusers, whose conversion script renames none; some of them by hand."""
    state = vae.state_dict()
    original = vae_to_original(state)
    trained = {f"vae.{name}": tensor for name, tensor in original.items()} | {"loss.logvar": torch.zeros(1)}

    for back in (vae_to_diffusers(original), vae_to_diffusers(trained)):
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert {
        "encoder.conv_in.conv.weight",
        "encoder.down_blocks.0.downsamplers.0.conv.conv.weight",
        "encoder.down_blocks.2.resnets.0.conv_shortcut.conv.weight",
        "encoder.mid_block.attentions.0.to_out.0.bias",
        "decoder.up_blocks.0.resnets.1.conv2.conv.weight",
        "decoder.up_blocks.2.upsamplers.0.conv.conv.bias",
        "decoder.conv_norm_out.weight",
        "quant_conv.weight",
        "post_quant_conv.weight",
    } <= original.keys()


@pytest.mark.parametrize(
    "name", ["encoder.mid_block.resnets.0.norm3.weight", "encoder.conv_in.weight", "x", "vae.x.bias"]
)
@pytest.mark.parametrize("convert", [vae_to_original, vae_to_diffusers])
def test_a_tensor_that_is_no_autoencoders_is_refused(vae, name, convert):
    with pytest.raises(LayerMatchError, match="must belong to HunyuanVideo's autoencoder"):
        convert({name: torch.zeros(1)})


def test_the_published_configuration_becomes_the_defaults_of_diffusers_class():
    """The original's keys and block names with the values of its 884-16c-hy autoencoder."""
    published = {
        "_class_name": "AutoencoderKLCausal3D",
        "_diffusers_version": "0.4.2",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlockCausal3D"] * 4,
        "in_channels": 3,
        "latent_channels": 16,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "sample_tsize": 64,
        "up_block_types": ["UpDecoderBlockCausal3D"] * 4,
        "scaling_factor": 0.476986,
        "time_compression_ratio": 4,
        "mid_block_add_attention": True,
    }

    arguments = vae_config_to_diffusers(published)

    with torch.device("meta"):
        default, built = AutoencoderKLHunyuanVideo(), AutoencoderKLHunyuanVideo(**arguments)
    assert plain_config(built.config) == plain_config(default.config)
    assert published.items() <= (vae_config_to_original(arguments) | {"_diffusers_version": "0.4.2"}).items()


def test_an_original_autoencoder_loads_and_computes_the_same(vae, tmp_path):
    config = vae_config_to_original(plain_config(vae.config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    trained = {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    torch.save({"state_dict": trained}, tmp_path / "pytorch_model.pt")

    loaded = load_vae(tmp_path, dtype=torch.float32)

    video = torch.randn(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.encode(video).latent_dist.mode(), vae.encode(video).latent_dist.mode())
    assert config["_class_name"] == "AutoencoderKLCausal3D"
    assert config["time_compression_ratio"] == 4


def test_an_autoencoder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')

    with pytest.raises(ConfigError, match="says AutoencoderKLWan; give HunyuanVideo's own"):
        load_vae(tmp_path, dtype=torch.float32)
