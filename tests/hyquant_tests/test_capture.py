"""Captured records and reference videos, with and without a store."""

import pytest
import torch

from hyquant.calibration.capture import capture_records, reference_videos
from hyquant.calibration.packing import pack_records, pack_stats, unpack_records, unpack_stats
from hyquant.calibration.stats import GroupStats
from hyquant.calibration.store import Store
from hyquant.models.base import RenderSettings
from hyquant.models.tiny import TinyVideoModel

SETTINGS = RenderSettings(height=16, width=16, num_frames=5, num_steps=2)
PROMPTS = ["a red ball", "a blue box that turns"]


@pytest.fixture(scope="module")
def model():
    return TinyVideoModel(0)


def assert_same_records(actual, expected):
    places = [(record.step_index, record.prompt_index) for record in actual]

    assert places == [(record.step_index, record.prompt_index) for record in expected]
    for one, other in zip(actual, expected, strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)


def test_packed_records_unpack_to_the_same(model):
    records = model.capture(PROMPTS, [1, 2], SETTINGS)

    assert_same_records(unpack_records(pack_records(records)), records)


def test_what_all_steps_share_is_stored_once(model):
    records = model.capture(PROMPTS[:1], [1], SETTINGS)

    packed = pack_records(records).tensors
    num_shared = len({"encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "guidance"})
    num_per_step = len(records[0].inputs) - num_shared

    assert len(packed) == num_shared + num_per_step * SETTINGS.num_steps


def test_records_from_the_store_equal_captured_ones(model, tmp_path):
    store = Store(tmp_path)
    captured = model.capture(PROMPTS, [1, 2], SETTINGS)

    first = capture_records(model, PROMPTS, [1, 2], SETTINGS, store)
    second = capture_records(model, PROMPTS, [1, 2], SETTINGS, store)

    assert_same_records(first, captured)
    assert_same_records(second, captured)


def test_each_prompt_is_an_entry_whatever_it_is_asked_with(model, tmp_path, monkeypatch):
    store = Store(tmp_path)
    both = capture_records(model, PROMPTS, [1, 2], SETTINGS, store)
    monkeypatch.setattr(model, "capture", lambda *_: pytest.fail("was captured again"))

    second = capture_records(model, PROMPTS[1:], [2], SETTINGS, store)

    assert [record.prompt_index for record in second] == [0, 0]
    assert torch.equal(second[0].inputs["hidden_states"], both[2].inputs["hidden_states"])


def test_reference_videos_are_rendered_once(model, tmp_path, monkeypatch):
    store = Store(tmp_path)
    rendered = model.render(PROMPTS, [1, 2], SETTINGS)
    first = reference_videos(model, PROMPTS, [1, 2], SETTINGS, store)
    monkeypatch.setattr(model, "render", lambda prompts, *_: [] if not prompts else pytest.fail("was rendered again"))
    second = reference_videos(model, PROMPTS, [1, 2], SETTINGS, store)

    for video, once, twice in zip(rendered, first, second, strict=True):
        assert torch.equal(once, video)
        assert torch.equal(twice, video)


def test_another_seed_or_clip_is_another_entry(model, tmp_path):
    store = Store(tmp_path)
    reference_videos(model, PROMPTS[:1], [1], SETTINGS, store)
    reference_videos(model, PROMPTS[:1], [2], SETTINGS, store)
    reference_videos(model, PROMPTS[:1], [1], SETTINGS.model_copy(update={"guidance_scale": 8.0}), store)
    reference_videos(model, PROMPTS[:1], [1], SETTINGS.model_copy(update={"batch_size": 1}), store)

    assert len(list(tmp_path.glob("*.json"))) == 3


def test_packed_statistics_unpack_to_the_same():
    generator = torch.Generator().manual_seed(0)
    stats = {
        name: GroupStats(
            lo=torch.randn(3, 4, generator=generator),
            hi=torch.randn(3, 4, generator=generator),
            sum_lo=torch.randn(3, generator=generator, dtype=torch.float64),
            sum_hi=torch.randn(3, generator=generator, dtype=torch.float64),
            calls=torch.tensor([1, 2, 3]),
        )
        for name in ("double_blocks.0.img_attn_qkv", "single_blocks.0.linear1")
    }

    unpacked = unpack_stats(pack_stats(stats))

    assert unpacked.keys() == stats.keys()
    for name, group in stats.items():
        for field in ("lo", "hi", "sum_lo", "sum_hi", "calls"):
            assert torch.equal(getattr(unpacked[name], field), getattr(group, field))
            assert getattr(unpacked[name], field).dtype == getattr(group, field).dtype
