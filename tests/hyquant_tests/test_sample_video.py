"""`hyquant.sample_video` on one rank: what every flag changes, against the mini model in Tencent's layout."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import load_file, save_file

from hyquant.calibration.records import StoredRecords
from hyquant.config import M3, M4, M6, FA3Int8, W8A8Dynamic, W8A8Static, W8A8Timestep
from hyquant.export import load_quantized, read_manifest, verify_export
from hyquant.models import load_model
from hyquant.models.base import GuidedSettings, RenderSettings
from hyquant.models.embedding import pad_together
from hyquant.models.sampling import draw_noise
from hyquant.models.vae_pieces import enable_tiling_, piece_decoder
from hyquant.sample_video import main
from hyquant.video.flags import build_parser
from hyquant.video.saving import save_video
from tests.hyquant_tests.video_commands import (
    PROMPTS,
    SHORT,
    WAYS,
    clip_flags,
    frames,
    launch,
    model_flags,
    write_prompts,
)
from tools.export_original_layout import MODEL

STATES = Path(MODEL) / "transformers" / "mp_rank_00_model_states.pt"
TABLE = (
    *("--model-base", "--dit-weight", "--vae-path", "--text-encoder-path", "--text-encoder-2-path"),
    *("--model-resolution", "--video-size", "--video-length", "--infer-steps", "--prompt", "--seed", "--flow-reverse"),
    *("--ulysses-degree", "--ring-degree", "--vae-parallel", "--num-videos", "--save-path"),
    *("--do_quant", "--quant_weight_save_folder", "--quant_dump_calib_folder", "--quant_type", "--anti_method"),
    "--do_save_video",
)
"""The flags of the parameter table of the seed's document."""

USUAL = ("--flow-shift", "--embedded-cfg-scale", "--cfg-scale", "--neg-prompt", "--load-key", "--device")
OURS = ("--target", "--overwrite", "--timestep-sep", "--act-method", "--dtype")


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """The float video of the plain command."""
    return rendered(base, tmp_path_factory.mktemp("plain"))[0]


def saved_by(words):
    """Run the command and return the videos that it saves, [T, C, H, W], by file name: the codec rounds as it likes."""
    videos = {}

    def save_and_keep(path, video):
        videos[path.name] = video
        save_video(path, video)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hyquant.video.render.save_video", save_and_keep)
        assert main(words) == 0
    return videos


def rendered(base, out, *more):
    """Render videos of one prompt and return them in order."""
    words = [*model_flags(base), *clip_flags(SHORT), "--save-path", str(out), "--do_save_video", *more]
    return list(saved_by(words).values())


def quantized(base, out, *more):
    """Quantize without saving videos and return the export's folder."""
    words = [*model_flags(base), *clip_flags(SHORT), "--do_quant"]
    folders = ["--quant_weight_save_folder", str(out / "weights"), "--quant_dump_calib_folder", str(out / "cache")]
    assert main([*words, *folders, *more]) == 0
    return out / "weights"


def same(video, other):
    """Whether two videos are equal but for float32 sums, whose order may follow where a file lies in memory."""
    return video.shape == other.shape and torch.allclose(video, other, rtol=0, atol=1e-4)


def differs(video, other):
    """Whether two videos of one size differ by ten times as much and more."""
    return video.shape == other.shape and (video - other).abs().max() > 1e-3


def scale_weights(path, factor):
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: tensor * (1 + factor * torch.randn(tensor.shape, generator=generator))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }
    save_file(noisy, path, metadata={"format": "pt"})


def test_the_flags_are_those_of_the_seeds_table_the_usual_ones_and_ours():
    flags = [option for action in build_parser()._actions for option in action.option_strings]

    assert sorted(flags) == sorted([*TABLE, *USUAL, *OURS, "-h", "--help"])
    assert len(TABLE) == 23


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("saves", [False, True], ids=["weights only", "with videos"])
def test_the_seeds_command_leaves_what_it_says(base, tmp_path, capsys, way, saves):
    out = tmp_path / "results"
    words = launch(base, write_prompts(tmp_path), out, way)
    kind = {"timestep": "w8a8_timestep"}.get(way, "w8a8_dynamic")

    assert main([*words, *(["--do_save_video"] if saves else [])]) == 0
    printed = capsys.readouterr().out.splitlines()
    written = {Path(line.removeprefix("wrote ")) for line in printed if line.startswith("wrote ")}

    model = load_model("hunyuan_video", str(base), device="cpu")
    folder = out / "quant" / "safetensors"
    assert {path.name for path in folder.iterdir()} == {
        "hyq_manifest.json",
        f"quant_model_weight_{kind}.safetensors",
        f"quant_model_description_{kind}.json",
    }
    assert verify_export(folder, model).problems == ()
    assert load_quantized(model.denoiser, folder, model.clock).config == read_manifest(folder).config
    assert len(StoredRecords([out / "quant" / "cache" / "calib_data"])) == 2 * 4
    assert len(list(out.glob("*.mp4"))) == (4 if saves else 0)
    found = {path for path in out.rglob("*") if path.is_file() and path.parent.name != "calib_data"}
    assert written == found | {out / "quant" / "cache" / "calib_data"}


def test_a_quantized_video_is_that_of_the_exported_weights(base, tmp_path):
    out = tmp_path / "results"
    videos = saved_by([*launch(base, write_prompts(tmp_path), out, "timestep"), "--do_save_video"])
    model = load_model("hunyuan_video", str(base), device="cpu")
    load_quantized(model.denoiser, out / "quant" / "safetensors", model.clock)
    settings = RenderSettings(height=32, width=32, num_frames=5, num_steps=4)
    (expected,) = model.render([PROMPTS[1]], [42], settings)
    float_video, video = (
        next(videos[name] for name in videos if name.startswith(f"0001_seed42_{label}_"))
        for label in ("float", "w8a8_timestep")
    )

    assert len(videos) == 4
    assert differs(video, float_video)
    # a float sum's last bit may decide which integer an activation becomes
    assert (video - expected).abs().max() < (video - float_video).abs().max() / 4


def test_without_do_quant_float_videos_are_all_there_is(base, tmp_path, plain):
    (video,) = rendered(base, tmp_path / "out")

    assert same(video, plain)
    assert [path.suffix for path in (tmp_path / "out").rglob("*")] == [".mp4"]


def test_model_base_is_where_relative_paths_tokenizers_schedule_and_template_are_found(changed, base, tmp_path, plain):
    (changed / "prompt_template.json").write_text(
        json.dumps({"template": "<bos> a {} <eot>", "crop_start": 2, "max_sequence_length": 16})
    )
    relative = ["--model-base", str(base), "--vae-path", f"{MODEL}/vae", "--text-encoder-path", "text_encoder"]

    assert same(rendered(base, tmp_path / "relative", *relative)[0], plain)
    assert differs(rendered(base, tmp_path / "other", "--model-base", str(changed))[0], plain)


def test_dit_weight_and_load_key_pick_the_denoisers_weights(changed, base, tmp_path, plain):
    content = torch.load(changed / STATES, weights_only=True)["module"]
    averaged = {name: tensor * 0.9 for name, tensor in content.items()}
    torch.save({"module": content, "ema": averaged}, changed / STATES)
    weights = ["--dit-weight", str(changed / STATES)]

    assert same(rendered(base, tmp_path / "same", *weights)[0], plain)
    (video,) = rendered(base, tmp_path / "ema", *weights, "--load-key", "ema")
    torch.save({"module": averaged}, changed / STATES)
    (other,) = rendered(base, tmp_path / "other", "--dit-weight", str(changed / STATES.parent))
    assert differs(video, plain)
    assert same(video, other)


@pytest.mark.parametrize(
    ("flag", "place", "file"),
    [
        ("--vae-path", f"{MODEL}/vae", "diffusion_pytorch_model.safetensors"),
        ("--text-encoder-path", "text_encoder", "model.safetensors"),
        ("--text-encoder-2-path", "text_encoder_2", "model.safetensors"),
    ],
)
def test_a_component_comes_from_its_own_path(changed, base, tmp_path, plain, flag, place, file):
    scale_weights(changed / place / file, 0.5)

    assert differs(rendered(base, tmp_path / "out", flag, str(changed / place))[0], plain)


def test_a_tokenizer_may_lie_with_its_encoder_as_published(changed, tmp_path, plain):
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(changed / name, changed / name.replace("tokenizer", "text_encoder"), dirs_exist_ok=True)
        shutil.rmtree(changed / name)

    assert same(rendered(changed, tmp_path / "out")[0], plain)


def test_model_resolution_limits_the_size_and_names_the_folder(changed, tmp_path, plain, capsys):
    (changed / MODEL).rename(changed / "hunyuan-video-t2v-540p")
    paths = ["--dit-weight", "transformers", "--vae-path", "vae", "--model-resolution"]

    assert same(rendered(changed, tmp_path / "540p", *paths, "540p")[0], plain)
    assert main([*model_flags(changed), *clip_flags(SHORT), "--do_save_video", *paths, "720p"]) == 1
    assert "--dit-weight must be a path, or one in --model-base" in capsys.readouterr().err


def test_video_size_and_length_are_those_of_the_file(base, tmp_path):
    rendered(base, tmp_path / "out", "--video-size", "32", "48", "--video-length", "9")
    (path,) = (tmp_path / "out").iterdir()

    assert frames(path).shape == (9, 32, 48, 3)


@pytest.mark.parametrize(
    "more",
    [
        ["--infer-steps", "3"],
        ["--prompt", PROMPTS[0]],
        ["--seed", "43"],
        ["--flow-shift", "9"],
        ["--embedded-cfg-scale", "1.5"],
        ["--cfg-scale", "3"],
    ],
    ids=lambda more: more[0],
)
def test_sampling_follows_the_flag(base, tmp_path, plain, more):
    assert differs(rendered(base, tmp_path / "out", *more)[0], plain)


def test_the_checkpoints_own_shift_is_used_unless_another_is_given(base, tmp_path, plain):
    """That of the mini model is 3."""
    assert same(rendered(base, tmp_path / "out", "--flow-shift", "3.0")[0], plain)


def test_neg_prompt_leads_away_from_what_it_says(base, tmp_path):
    guided = ["--cfg-scale", "3"]
    (without,) = rendered(base, tmp_path / "without", *guided)

    assert differs(rendered(base, tmp_path / "with", *guided, "--neg-prompt", PROMPTS[0])[0], without)


def test_classifier_free_guidance_is_the_published_formula(base):
    """Against a loop of our own over the pipeline's parts: two calls a step, and Euler's rule."""
    model = load_model("hunyuan_video", str(base), device="cpu")
    clip = {"height": 32, "width": 32, "num_frames": 5, "num_steps": 2}
    (found,) = model.render([SHORT], [0], GuidedSettings(**clip, cfg_scale=3.0, negative_prompt=PROMPTS[0]))
    texts = [pad_together(model.embed([prompt])) for prompt in (SHORT, PROMPTS[0])]
    shifted = [3 * s / (1 + 2 * s) for s in (1.0, 0.5, 0.0)]
    latents = draw_noise([0], (8, 2, 8, 8))
    with torch.no_grad():
        for sigma, after in itertools.pairwise(shifted):
            toward, away = (
                model.denoiser(
                    hidden_states=latents,
                    timestep=torch.tensor([sigma * 1000]),
                    encoder_hidden_states=tokens,
                    encoder_attention_mask=mask,
                    pooled_projections=pooled,
                    guidance=torch.tensor([6000.0]),
                    return_dict=False,
                )[0]
                for tokens, pooled, mask in texts
            )
            latents = latents + (after - sigma) * (away + 3.0 * (toward - away))
        expected = model.vae.decode(latents / model.vae.config.scaling_factor).sample

    torch.testing.assert_close(found, (expected[0].movedim(0, 1) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_the_original_decoder_works_in_tiles_as_upstream():
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    latents = torch.zeros(1, 4, 1, 33, 32)
    whole = len(piece_decoder(vae).cut(latents))

    enable_tiling_(vae)

    assert whole == 1
    assert len(piece_decoder(vae).cut(latents)) > 1


def test_num_videos_counts_seeds_up(base, tmp_path, plain):
    first, second = rendered(base, tmp_path / "both", "--num-videos", "2")
    (alone,) = rendered(base, tmp_path / "alone", "--seed", "43")

    assert same(first, plain)
    assert same(second, alone)


def test_a_seed_that_is_not_given_is_drawn_and_told(base, tmp_path, capsys):
    words = [*model_flags(base), *clip_flags(SHORT), "--save-path", str(tmp_path / "out"), "--do_save_video"]
    where = words.index("--seed")
    ((name, video),) = saved_by(words[:where] + words[where + 2 :]).items()
    told = int(capsys.readouterr().out.splitlines()[0].partition("seed=")[2].split()[0])

    assert name.startswith(f"0000_seed{told}_float_")
    assert same(video, rendered(base, tmp_path / "again", "--seed", str(told))[0])


def test_dtype_is_that_of_the_weights(base, tmp_path, plain, capsys):
    assert differs(rendered(base, tmp_path / "out", "--dtype", "bfloat16")[0], plain)
    assert "dtype=torch.bfloat16" in capsys.readouterr().out
    assert read_manifest(quantized(base, tmp_path, "--dtype", "float16")).config.deploy_dtype == "float16"


def test_device_says_where_the_model_runs(base, tmp_path, capsys):
    rendered(base, tmp_path / "out", "--device", "cpu")

    assert "device=cpu" in capsys.readouterr().out
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert main([*model_flags(base), *clip_flags(SHORT), "--do_save_video", "--device", "cuda"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_save_path_is_where_videos_go_and_overwrite_lets_them_be_replaced(base, tmp_path, capsys):
    out = tmp_path / "deep" / "folder"
    rendered(base, out)
    words = [*model_flags(base), *clip_flags(SHORT), "--save-path", str(out), "--do_save_video"]

    assert main(words) == 1
    assert "a video must not replace another" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("flags", "linear", "smoothing", "attention", "excluded"),
    [
        (["--quant_type", "w8a8_timestep"], W8A8Timestep(timestep_sep=1), None, None, "*fc2*"),
        (["--quant_type", "w8a8_dynamic"], W8A8Dynamic(), None, None, "*fc2*"),
        (["--quant_type", "w8a8"], W8A8Static(), None, None, "*fc2*"),
        (["--quant_type", "w8a8_dynamic_fa3"], W8A8Dynamic(), None, FA3Int8(), "*modulation*"),
        (["--quant_type", "w8a8_dynamic", "--anti_method", "m3"], W8A8Dynamic(), M3, None, "*fc2*"),
        (["--quant_type", "w8a8_dynamic", "--anti_method", "m4"], W8A8Dynamic(), M4, None, "*fc2*"),
        (["--quant_type", "w8a8", "--anti_method", "m6"], W8A8Static(), M6, None, "*fc2*"),
        ([], W8A8Timestep(timestep_sep=1), None, None, "*fc2*"),
        (["--timestep-sep", "0"], W8A8Timestep(timestep_sep=0), None, None, "*fc2*"),
        (["--act-method", "histogram"], W8A8Timestep(timestep_sep=1, act_method="histogram"), None, None, "*fc2*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_quant_type_and_its_like_say_what_is_quantized(base, tmp_path, flags, linear, smoothing, attention, excluded):
    config = read_manifest(quantized(base, tmp_path, *flags)).config

    assert config.linear == linear
    assert config.attention == attention
    assert config.layers.exclude[-1] == excluded
    if smoothing is not None:
        assert isinstance(config.smoothing, smoothing)
        assert config.smoothing.layers == ("*double_blocks.*attn_qkv",)
    else:
        assert config.smoothing is None


def test_layers_are_those_of_the_seeds_patterns(base, tmp_path):
    """2 x 4 fused Linears of the double block are left without modulation and fc2, and 2 of each single block."""
    plan = read_manifest(quantized(base, tmp_path / "a")).plan
    with_fa3 = read_manifest(quantized(base, tmp_path / "b", "--quant_type", "w8a8_dynamic_fa3")).plan
    double = {"txt_mod.linear"} | {
        f"{side}_{kind}" for side in ("img", "txt") for kind in ("attn_qkv", "attn_proj", "mlp.fc1")
    }
    single = {f"single_blocks.{block}.linear{number}" for block in range(4) for number in (1, 2)}
    fc2 = {f"double_blocks.0.{side}_mlp.fc2" for side in ("img", "txt")}

    assert {layer.name for layer in plan.quantized} == {f"double_blocks.0.{name}" for name in double} | single
    assert {layer.name for layer in with_fa3.quantized} - {layer.name for layer in plan.quantized} == fc2


def test_target_says_who_is_to_execute_the_weights(base, tmp_path, capsys):
    engine = ["--target", "mindie-sd-3.1/910b"]
    words = [*model_flags(base), *clip_flags(SHORT), "--do_quant", "--quant_type", "w8a8_dynamic_fa3", *engine]
    folders = ["--quant_weight_save_folder", str(tmp_path / "w"), "--quant_dump_calib_folder", str(tmp_path / "c")]

    assert read_manifest(quantized(base, tmp_path, *engine)).target == "mindie-sd-3.1/910b"
    assert main([*words, *folders]) == 1
    assert "ignores int8 attention without a message" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_calibration_records_are_used_again_by_any_quantization_and_captured_again_when_stale(base, tmp_path, capsys):
    quantized(base, tmp_path)
    first = sorted(path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*"))
    assert "calibration records captured, because those before are absent" in capsys.readouterr().out

    quantized(base, tmp_path, "--quant_type", "w8a8_dynamic_fa3", "--overwrite")
    assert "calibration records reused" in capsys.readouterr().out
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")) == first

    quantized(base, tmp_path, "--seed", "7", "--flow-shift", "5", "--overwrite")
    assert "because those before are stale, other model, seeds:" in capsys.readouterr().out

    damaged = next((tmp_path / "cache" / "calib_data").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    quantized(base, tmp_path, "--seed", "7", "--flow-shift", "5", "--overwrite")
    assert "because those before are damaged:" in capsys.readouterr().out


def test_videos_are_saved_from_reused_records_too(base, tmp_path, plain):
    weights = quantized(base, tmp_path)
    folders = ["--quant_weight_save_folder", str(weights), "--quant_dump_calib_folder", str(tmp_path / "cache")]

    float_video, other = rendered(base, tmp_path / "out", "--do_quant", "--overwrite", *folders)

    assert same(float_video, plain)
    assert differs(other, plain)


def test_records_hold_both_calls_of_a_guided_step(base, tmp_path):
    quantized(base, tmp_path, "--cfg-scale", "2")
    records = StoredRecords([tmp_path / "cache" / "calib_data"])

    assert [record.step_index for record in records] == [0, 0, 1, 1]


def test_files_of_records_and_weights_are_not_readable_by_others(base, tmp_path):
    quantized(base, tmp_path)

    for path in [*(tmp_path / "cache").rglob("*"), *(tmp_path / "weights").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
