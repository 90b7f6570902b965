"""The tiny model fulfils what tests assume of every video model."""

import pytest
import torch

from hyquant.calibration.capture import capture_in_memory
from hyquant.errors import ConfigError
from hyquant.models import load_model
from hyquant.models.base import DeploymentShape, RenderSettings
from hyquant.models.tiny import TinyVideoModel, decode

SETTINGS = RenderSettings(height=32, width=16, num_frames=9, num_steps=3)
PROMPTS, SEEDS = ["a red ball", "a blue box that turns left", "snow"], [1, 2, 3]


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", "0", device="cpu")


def render(model, prompts=PROMPTS, seeds=SEEDS, **changes):
    return model.render(prompts, seeds, SETTINGS.model_copy(update=changes))


def test_videos_have_the_agreed_shape_dtype_and_range(model):
    videos = render(model)

    assert len(videos) == 3
    for video in videos:
        assert video.shape == (9, 3, 32, 16)
        assert video.dtype == torch.float32
        assert 0 <= video.min() < video.max() <= 1


def test_rendering_twice_gives_the_same_bits(model):
    for one, other in zip(render(model), render(model), strict=True):
        assert torch.equal(one, other)


def test_another_process_would_render_the_same(model):
    for one, other in zip(render(model), render(TinyVideoModel(0)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_videos_do_not_depend_on_the_batch(model, batch_size):
    """Float32 products over other batch sizes round differently; pixels are of order 1."""
    for one, other in zip(render(model), render(model, batch_size=batch_size), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"prompts": ["a green ball"]}, id="prompt"),
        pytest.param({"seeds": [7]}, id="seed"),
        pytest.param({"num_steps": 5}, id="steps"),
        pytest.param({"guidance_scale": 3.0}, id="guidance"),
    ],
)
def test_a_video_depends_on_everything_it_is_asked_for(model, changes):
    base = {"prompts": PROMPTS[:1], "seeds": SEEDS[:1]}

    assert (render(model, **base)[0] - render(model, **base | changes)[0]).abs().max() > 1e-3


def test_the_output_depends_on_every_weight(model):
    inputs = capture_in_memory(model, PROMPTS[:1], SEEDS[:1], SETTINGS)[1].inputs
    denoiser = TinyVideoModel(0).denoiser.requires_grad_(True)
    (output,) = denoiser(**inputs, return_dict=False)
    output.square().sum().backward()
    idle = [name for name, weight in denoiser.named_parameters() if weight.grad is None or not weight.grad.any()]

    # A key bias shifts all scores of a query alike, which softmax ignores, unless keys are normalized afterwards.
    assert idle == [] or all("refiner" in name and "to_k.bias" in name for name in idle)


def test_other_seeds_give_other_weights_and_fingerprints(model):
    assert TinyVideoModel(1).fingerprint() != model.fingerprint()
    assert TinyVideoModel(0).fingerprint() == model.fingerprint()


def test_building_it_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    TinyVideoModel(0)

    assert torch.equal(torch.rand(3), expected)


def test_capture_records_every_step_of_every_prompt_in_order(model):
    records = capture_in_memory(model, PROMPTS, SEEDS, SETTINGS)

    assert [(record.prompt_index, record.step_index) for record in records] == [
        (p, s) for p in range(3) for s in range(3)
    ]
    assert [records[3 * p].inputs["encoder_hidden_states"].shape[1] for p in range(3)] == [3, 6, 1]
    assert all(bool(record.inputs["encoder_attention_mask"].all()) for record in records)


def test_replaying_records_gives_the_loops_own_trajectory(model):
    """Euler by hand over recorded inputs: x' = x + (sigma' - sigma) v, with sigma = timestep / 1000."""
    records = capture_in_memory(model, PROMPTS[:1], SEEDS[:1], SETTINGS)
    first, second = records[0].inputs, records[1].inputs
    (velocity,) = model.denoiser(**first, return_dict=False)
    sigmas = [record.inputs["timestep"].item() / 1000 for record in records]

    expected = first["hidden_states"] + (sigmas[1] - sigmas[0]) * velocity

    torch.testing.assert_close(second["hidden_states"], expected, atol=1e-6, rtol=0)


def test_the_clock_tells_the_step_of_each_call_and_rests_outside_the_loop(model):
    seen = []
    handle = model.denoiser.register_forward_pre_hook(lambda *_: seen.append(model.clock.step_index))
    render(model, batch_size=2)
    model.clock.set(2)
    model.denoiser(**capture_in_memory(model, PROMPTS[:1], SEEDS[:1], SETTINGS)[0].inputs)
    handle.remove()

    assert seen == [0, 1, 2] * 3 + [2]
    assert model.clock.num_steps == 3


def test_on_step_is_called_after_every_step_of_every_batch(model):
    calls = []
    model.render(PROMPTS, SEEDS, SETTINGS.model_copy(update={"batch_size": 2}), on_step=lambda: calls.append(1))

    assert len(calls) == 2 * SETTINGS.num_steps


def test_an_error_while_rendering_leaves_the_clock_to_the_next_caller(model):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.render(PROMPTS[:1], SEEDS[:1], SETTINGS, on_step=stop)
    inputs = model.deployment_inputs(DeploymentShape(height=16, width=16, num_frames=5, num_steps=3))
    model.clock.set(1)
    model.denoiser(**inputs)

    assert model.clock.step_index == 1


def test_deployment_inputs_have_the_shapes_and_dtypes_of_captured_ones(model):
    shape = DeploymentShape(height=64, width=32, num_frames=9, num_steps=3, batch_size=2)
    inputs = model.deployment_inputs(shape)
    captured = capture_in_memory(model, PROMPTS[:1], SEEDS[:1], SETTINGS)[0].inputs

    assert inputs["hidden_states"].shape == (2, 4, 3, 16, 8)
    assert {name: tensor.dtype for name, tensor in inputs.items()} == {k: t.dtype for k, t in captured.items()}


def test_frames_that_do_not_fit_the_codec_are_refused(model):
    with pytest.raises(ConfigError, match=r"1 \+ a multiple of 4, but got 10; give 9"):
        render(model, num_frames=10)


def test_each_prompt_needs_a_seed(model):
    with pytest.raises(ConfigError, match="3 prompts and 1 seeds"):
        model.render(PROMPTS, [1], SETTINGS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_in_other_dtypes(dtype):
    model = TinyVideoModel(0, dtype=dtype)
    video = model.render(PROMPTS[:1], SEEDS[:1], SETTINGS)[0]

    assert model.denoiser.proj_out.weight.dtype == dtype
    assert video.dtype == torch.float32
    assert bool(torch.isfinite(video).all())


def test_decoding_is_linear_away_from_black_and_white():
    latents = 0.1 * torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    middle = decode(torch.zeros_like(latents))

    torch.testing.assert_close(decode(2 * latents) - middle, 2 * (decode(latents) - middle), atol=1e-6, rtol=0)
    assert decode(latents).shape == (2, 5, 3, 12, 12)
