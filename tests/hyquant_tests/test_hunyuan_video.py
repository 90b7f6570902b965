"""The adapter around diffusers' pipeline, on the shipped mini weights: it adds, it does not change."""

import logging
import os
import shutil

import pytest
import torch

from hyquant.calibration.capture import capture_in_memory
from hyquant.errors import ConfigError
from hyquant.models import load_model, mini
from hyquant.models.base import DeploymentShape, RenderSettings
from hyquant.models.hunyuan_folder import find_source, load_pipeline
from hyquant.models.hunyuan_video import pipeline_fingerprint

SETTINGS = RenderSettings(height=32, width=16, num_frames=5, num_steps=3)
PROMPTS = ["a red square moving left on a black background", "a blue circle moving up", "a white cross standing still"]
SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def model():
    return load_model("hunyuan_video", "mini", device="cpu")


@pytest.fixture
def folder(tmp_path):
    """A folder of links to the mini weights, to take things away from."""
    shutil.copytree(mini.WEIGHTS, tmp_path / "weights", copy_function=lambda source, to: os.symlink(source, to))
    return tmp_path / "weights"


def test_it_renders_what_the_pipeline_itself_renders(model):
    """Padding text or not differs by float32 rounding only; pixels are of order 1."""
    from diffusers import HunyuanVideoPipeline

    pipe = HunyuanVideoPipeline.from_pretrained(str(mini.WEIGHTS), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt=PROMPTS[0],
        height=32,
        width=16,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(SEEDS[0]),
        prompt_template=mini.PROMPT_TEMPLATE,
        max_sequence_length=mini.MAX_SEQUENCE_LENGTH,
        output_type="pt",
    ).frames[0]

    actual = model.render(PROMPTS[:1], SEEDS[:1], SETTINGS)[0]

    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_videos_have_the_agreed_shape_dtype_and_range(model):
    videos = model.render(PROMPTS, SEEDS, SETTINGS)

    assert [video.shape for video in videos] == [(5, 3, 32, 16)] * 3
    assert all(video.dtype == torch.float32 and 0 <= video.min() < video.max() <= 1 for video in videos)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_videos_do_not_depend_on_the_batch(model, batch_size):
    together = model.render(PROMPTS, SEEDS, SETTINGS)
    apart = model.render(PROMPTS, SEEDS, SETTINGS.model_copy(update={"batch_size": batch_size}))

    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_rendering_twice_gives_the_same_bits(model):
    for one, other in zip(model.render(PROMPTS, SEEDS, SETTINGS), model.render(PROMPTS, SEEDS, SETTINGS), strict=True):
        assert torch.equal(one, other)


def test_the_clock_tells_the_step_of_each_call(model):
    seen = []
    handle = model.denoiser.register_forward_pre_hook(lambda *_: seen.append(model.clock.step_index))
    model.render(PROMPTS, SEEDS, SETTINGS.model_copy(update={"batch_size": 2}))
    handle.remove()

    assert seen == [0, 1, 2] * 2
    assert model.clock.num_steps == 3


def test_the_clock_may_be_set_by_hand_outside_the_loop(model):
    model.render(PROMPTS[:1], SEEDS[:1], SETTINGS)
    model.clock.set(1)
    model.denoiser(**model.deployment_inputs(DeploymentShape(height=16, width=16, num_frames=5, num_steps=3)))

    assert model.clock.step_index == 1


def test_on_step_is_called_after_every_step(model):
    calls = []
    model.render(PROMPTS, SEEDS, SETTINGS, on_step=lambda: calls.append(model.clock.step_index))

    assert calls == [0, 1, 2]


def test_captured_text_is_not_padded_and_inputs_replay(model):
    records = capture_in_memory(model, PROMPTS, SEEDS, SETTINGS)
    (output,) = model.denoiser(**records[4].inputs, return_dict=False)
    lengths = [records[3 * index].inputs["encoder_hidden_states"].shape[1] for index in range(3)]

    places = [(record.prompt_index, record.step_index) for record in records]

    assert places == [(prompt, step) for prompt in range(3) for step in range(3)]
    assert lengths == [len(prompt.split()) + 1 for prompt in PROMPTS]  # a token per word, and the template's end
    assert all(bool(record.inputs["encoder_attention_mask"].all()) for record in records)
    assert output.shape == records[4].inputs["hidden_states"].shape


def test_deployment_inputs_look_like_captured_ones(model):
    shape = DeploymentShape(height=64, width=32, num_frames=9, num_steps=3, batch_size=2)
    captured = capture_in_memory(model, PROMPTS[:1], SEEDS[:1], SETTINGS)[0].inputs

    inputs = model.deployment_inputs(shape)

    assert inputs["hidden_states"].shape == (2, 8, 3, 16, 8)
    assert {name: tensor.dtype for name, tensor in inputs.items()} == {k: t.dtype for k, t in captured.items()}
    assert inputs["encoder_hidden_states"].shape[2] == captured["encoder_hidden_states"].shape[2]


def test_prompts_are_encoded_once(model, monkeypatch):
    first = model.embed([PROMPTS[0], PROMPTS[0]])
    monkeypatch.setattr(model._prompts, "_encode", lambda prompts: pytest.fail("was encoded again"))

    again = model.embed([PROMPTS[0]])

    assert again[0] is first[0] is first[1]


def test_a_prompt_that_is_too_long_is_refused(model):
    with pytest.raises(ConfigError, match=r"must fit into 16 tokens, but got 19"):
        model.render([f"{PROMPTS[0]} {PROMPTS[0]}"], [1], SETTINGS)


def test_unknown_words_are_refused_with_those_that_are_known(model):
    with pytest.raises(ConfigError, match=r"but got 'purple', 'dinosaur' .* it knows .*background.*yellow"):
        model.embed(["a purple dinosaur"])


def test_frames_that_do_not_fit_the_decoder_are_refused(model):
    with pytest.raises(ConfigError, match=r"1 \+ a multiple of 4, but got 4"):
        model.render(PROMPTS[:1], [1], SETTINGS.model_copy(update={"num_frames": 4}))


def test_rounded_guidance_is_warned_of_once(model, caplog, monkeypatch):
    monkeypatch.setattr(model, "dtype", torch.bfloat16)
    monkeypatch.setattr(model, "_has_warned", False)
    with caplog.at_level(logging.WARNING, logger="hyquant"):
        model._warn_once_of_rounded_guidance(8.0)
        exact = len(caplog.records)
        model._warn_once_of_rounded_guidance(6.0)
        model._warn_once_of_rounded_guidance(6.0)

    assert exact == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_folder_takes_the_same_path_with_the_published_template(folder):
    """Only template and length differ from "mini"; the mini tokenizer knows few words of the published template."""
    source = find_source(str(folder))

    assert source.folder == folder
    assert source.prompt_template is None
    assert source.max_sequence_length == 256

    with pytest.raises(ConfigError, match="vocabulary"):
        load_model("hunyuan_video", str(folder), device="cpu").embed(["a red square"])


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "transformer"),
        ("transformer/config.json", "transformer"),
        ("scheduler/scheduler_config.json", "scheduler"),
        ("tokenizer_2/tokenizer_config.json", "tokenizer_2"),
        ("text_encoder/model.safetensors", "text_encoder"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_by_component(folder, lost, named):
    (folder / lost).unlink()

    with pytest.raises(ConfigError, match=rf"lacks files of {named}; complete the download"):
        load_model("hunyuan_video", str(folder), device="cpu")


def test_a_missing_shard_is_noticed(folder):
    index = folder / "transformer" / "x.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x-00001-of-00002.safetensors"}}')

    with pytest.raises(ConfigError, match="lacks files of transformer"):
        find_source(str(folder))


def test_a_damaged_weight_file_is_one_sentence(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.write_bytes(b"not safetensors")

    with pytest.raises(ConfigError, match="must load as a HunyuanVideoPipeline"):
        load_model("hunyuan_video", str(folder), device="cpu")


@pytest.mark.parametrize("source", ["nowhere", "hunyuanvideo-community/HunyuanVideo"])
def test_what_is_no_folder_is_refused_without_trying_the_network(source):
    with pytest.raises(ConfigError, match=r"source must be mini, mini-outliers or a folder .* is no folder"):
        load_model("hunyuan_video", source, device="cpu")


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds model_index\.json, but .* does not"):
        load_model("hunyuan_video", str(tmp_path), device="cpu")


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(find_source("mini"), dtype=torch.float32)


def nudge(module: torch.nn.Module) -> None:
    parameter = next(module.parameters())
    parameter.data.view(-1)[0] += 1.0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda pipe: nudge(pipe.transformer), id="denoiser"),
        pytest.param(lambda pipe: nudge(pipe.text_encoder), id="text encoder"),
        pytest.param(lambda pipe: nudge(pipe.text_encoder_2), id="second text encoder"),
        pytest.param(lambda pipe: nudge(pipe.vae), id="decoder"),
        pytest.param(lambda pipe: pipe.scheduler.register_to_config(shift=11.0), id="scheduler"),
        pytest.param(lambda pipe: pipe.tokenizer.add_tokens(["hexagon"]), id="vocabulary"),
        pytest.param(lambda pipe: pipe.transformer.to(torch.bfloat16), id="dtype"),
        pytest.param(None, id="prompt template"),
    ],
)
def test_whatever_shapes_a_video_changes_the_fingerprint(pipe, change):
    """So neither records nor videos of other weights are ever taken for those of these."""
    template = {"template": "{}", "crop_start": 0}
    before = pipeline_fingerprint(pipe, template)
    if change is None:
        template["crop_start"] = 1
    else:
        change(pipe)

    assert pipeline_fingerprint(pipe, template) != before
    assert pipeline_fingerprint(pipe, template) == pipeline_fingerprint(pipe, template)


@pytest.mark.skipif(not mini.OUTLIERS.is_file(), reason="the mini model's outliers.json is not there")
def test_outliers_change_activations_but_not_the_video(model):
    other = load_model("hunyuan_video", "mini-outliers", device="cpu")
    seen = {}

    def watch(which):
        return lambda module, args: seen.__setitem__(which, max(seen.get(which, 0.0), args[0].abs().max().item()))

    for which, each in {"plain": model, "outliers": other}.items():
        for block in each.denoiser.single_transformer_blocks:
            block.proj_mlp.register_forward_pre_hook(watch(which))
    plain, outliers = (each.render(PROMPTS[:1], SEEDS[:1], SETTINGS)[0] for each in (model, other))

    torch.testing.assert_close(outliers, plain, atol=1e-3, rtol=0)
    assert seen["outliers"] > 2 * seen["plain"]
    assert other.fingerprint() != model.fingerprint()
    assert other.source == "mini-outliers"
