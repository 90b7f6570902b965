"""Latents along the loop, kept and compared."""

import pytest
import torch

from hyquant.config import QuantConfig, W8A8Dynamic
from hyquant.latents import MAX_ELEMENTS, LatentTrace, mean_curve, relative_l2
from hyquant.models.base import RenderSettings
from hyquant.models.tiny import TinyVideoModel, decode
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, restore_

SETTINGS = RenderSettings(height=16, width=16, num_frames=5, num_steps=3, batch_size=2)
PROMPTS, SEEDS = ["a cube", "two grey balls", "one ring"], [1, 2, 3]


def rendered(model, settings=SETTINGS):
    trace = LatentTrace(settings.num_steps)
    videos = model.render(PROMPTS, SEEDS, settings, on_latents=trace)
    return videos, trace.traces


def test_every_prompt_has_the_latents_of_every_step_and_the_last_are_those_of_its_video():
    videos, traces = rendered(TinyVideoModel(0))

    assert [trace.shape for trace in traces] == [(3, 4 * 2 * 4 * 4)] * 3
    for video, trace in zip(videos, traces, strict=True):
        # Decoded alone and in a batch of two, colours are mixed in another order: some 1e-7 of 1.
        assert torch.allclose(decode(trace[-1].reshape(1, 4, 2, 4, 4))[0], video, atol=1e-6)


def test_the_error_of_a_quantized_loop_is_that_of_a_loop_over_its_captured_inputs():
    """What the denoiser is given at step i + 1 are the latents after step i."""
    model = TinyVideoModel(0)
    _, floats = rendered(model)
    plan = build_plan(model.groups(), QuantConfig(linear=W8A8Dynamic()), num_steps=3)
    expected = {}
    for name in ("float", "int8"):
        if name == "int8":
            quantize_(model.denoiser, plan, {}, model.clock)
            _, int8 = rendered(model)
        records = []
        model.capture(PROMPTS[:1], SEEDS[:1], SETTINGS, records.append)
        expected[name] = [record.inputs["hidden_states"].double().flatten() for record in records[1:]]
    restore_(model.denoiser)
    by_hand = [float((q - f).norm() / f.norm()) for q, f in zip(expected["int8"], expected["float"], strict=True)]

    found = relative_l2(int8[0], floats[0])

    # Alone and in a batch of two the same latents are rounded differently, by some 1e-6 of an error of 1e-3.
    assert found[:-1].tolist() == pytest.approx(by_hand, rel=0.02)
    assert 0.0 < float(found[0]) < 0.5
    assert relative_l2(floats[0], floats[0]).tolist() == [0.0, 0.0, 0.0]


def test_of_large_latents_a_sample_tells_the_error_within_two_percent():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1, 16, 8, 64, 64, generator=generator)
    candidate = reference + 0.1 * torch.randn(reference.shape, generator=generator)
    whole = float((candidate - reference).norm() / reference.norm())
    traces = []
    for latents in (candidate, reference):
        trace = LatentTrace(1)
        trace(latents)
        traces += trace.traces

    assert reference.numel() > MAX_ELEMENTS == traces[0].shape[1]
    assert float(relative_l2(*traces)) == pytest.approx(whole, rel=0.02)


def test_the_mean_curve_is_over_prompts():
    assert mean_curve([[1.0, 2.0], [3.0, 6.0]]) == (2.0, 4.0)
    assert mean_curve([]) == ()
