"""Captured records and reference videos, with and without a store."""

import copy
import os

import pytest
import torch

from hyquant.calibration.capture import cache_key, capture_in_memory, capture_records, reference_videos
from hyquant.calibration.histogram import concatenate_steps, empty_histogram, histogram_of
from hyquant.calibration.packing import pack_stats, unpack_stats
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


def test_records_from_the_store_equal_captured_ones(model, tmp_path):
    store = Store(tmp_path)
    captured = capture_in_memory(model, PROMPTS, [1, 2], SETTINGS)

    first = capture_records(model, PROMPTS, [1, 2], SETTINGS, store)
    second = capture_records(model, PROMPTS, [1, 2], SETTINGS, store)

    assert_same_records(first, captured)
    assert_same_records(second, captured)


def test_records_that_are_used_again_have_the_time_of_their_use(model, tmp_path):
    capture_records(model, PROMPTS, [1, 2], SETTINGS, Store(tmp_path))
    indices = sorted(tmp_path.glob("*/records.json"))
    for index in indices:
        os.utime(index, (1000, 1000))
    capture_records(model, PROMPTS[1:], [2], SETTINGS, Store(tmp_path))

    assert sorted(index.stat().st_mtime > 1000 for index in indices) == [False, True]


def test_each_prompt_is_an_entry_whatever_it_is_asked_with(model, tmp_path, monkeypatch):
    store = Store(tmp_path)
    both = capture_records(model, PROMPTS, [1, 2], SETTINGS, store)
    monkeypatch.setattr(model, "capture", lambda *_: pytest.fail("was captured again"))

    second = capture_records(model, PROMPTS[1:], [2], SETTINGS, store)

    assert [record.prompt_index for record in second] == [0, 0]
    assert torch.equal(second[0].inputs["hidden_states"], both[2].inputs["hidden_states"])


def test_a_capture_goes_on_with_the_prompt_it_was_interrupted_in(model, tmp_path, monkeypatch):
    """The first prompt is whole and stays; of the second, whose second step never came, nothing is left."""
    capture, asked = model.capture, []

    def interrupted(prompts, seeds, settings, sink):
        def fragile(record):
            if prompts == PROMPTS[1:] and record.step_index == 1:
                raise KeyboardInterrupt
            sink(record)

        capture(prompts, seeds, settings, fragile)

    monkeypatch.setattr(model, "capture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture_records(model, PROMPTS, [1, 2], SETTINGS, Store(tmp_path))
    left = [path.name for path in tmp_path.iterdir()]

    monkeypatch.setattr(model, "capture", lambda prompts, *rest: asked.append(prompts) or capture(prompts, *rest))
    records = capture_records(model, PROMPTS, [1, 2], SETTINGS, Store(tmp_path))

    assert left == [cache_key("records", model, PROMPTS[0], 1, SETTINGS)]
    assert asked == [PROMPTS[1:]]
    assert len(records) == 4


def test_a_damaged_prompt_alone_is_captured_again(model, tmp_path, monkeypatch):
    store, capture, asked = Store(tmp_path), model.capture, []
    expected = capture_in_memory(model, PROMPTS, [1, 2], SETTINGS)
    capture_records(model, PROMPTS, [1, 2], SETTINGS, store)
    damaged = next(iter(store.folder(cache_key("records", model, PROMPTS[0], 1, SETTINGS)).glob("*.safetensors")))
    damaged.write_bytes(damaged.read_bytes()[:-1])

    monkeypatch.setattr(model, "capture", lambda prompts, *rest: asked.append(prompts) or capture(prompts, *rest))
    records = capture_records(model, PROMPTS, [1, 2], SETTINGS, store)

    assert asked == [PROMPTS[:1]]
    assert_same_records(records, expected)


def test_on_prompt_is_called_after_every_prompt_captured_or_not(model, tmp_path):
    calls: list[int] = []
    for _ in range(2):
        capture_records(model, PROMPTS, [1, 2], SETTINGS, Store(tmp_path), on_prompt=lambda: calls.append(1))

    assert len(calls) == 4


def with_attribute(model: TinyVideoModel, name: str, value: object) -> TinyVideoModel:
    other = copy.copy(model)
    setattr(other, name, value)
    return other


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m, p, s, c: (TinyVideoModel(1), p, s, c), id="denoiser weights"),
        pytest.param(lambda m, p, s, c: (with_attribute(m, "_fingerprint", "x-y"), p, s, c), id="fingerprint"),
        pytest.param(lambda m, p, s, c: (with_attribute(m, "dtype", torch.bfloat16), p, s, c), id="dtype"),
        pytest.param(lambda m, p, s, c: (with_attribute(m, "kind", "other"), p, s, c), id="kind of model"),
        pytest.param(lambda m, p, s, c: (m, "another", s, c), id="prompt"),
        pytest.param(lambda m, p, s, c: (m, p, s + 1, c), id="seed"),
        pytest.param(lambda m, p, s, c: (m, p, s, c.model_copy(update={"height": 32})), id="height"),
        pytest.param(lambda m, p, s, c: (m, p, s, c.model_copy(update={"width": 32})), id="width"),
        pytest.param(lambda m, p, s, c: (m, p, s, c.model_copy(update={"num_frames": 9})), id="frames"),
        pytest.param(lambda m, p, s, c: (m, p, s, c.model_copy(update={"num_steps": 3})), id="steps"),
        pytest.param(lambda m, p, s, c: (m, p, s, c.model_copy(update={"guidance_scale": 8.0})), id="guidance"),
    ],
)
def test_whatever_records_depend_on_changes_their_key(model, change):
    """The parts of a fingerprint are tested with the models that have them."""
    same = cache_key("records", TinyVideoModel(0), "a", 1, SETTINGS.model_copy(update={"batch_size": 1}))

    assert cache_key("records", model, "a", 1, SETTINGS) == same
    assert cache_key("records", *change(model, "a", 1, SETTINGS)) != same


def test_reference_videos_are_rendered_once(model, tmp_path, monkeypatch):
    store = Store(tmp_path)
    rendered = model.render(PROMPTS, [1, 2], SETTINGS)
    first = reference_videos(model, PROMPTS, [1, 2], SETTINGS, store)
    monkeypatch.setattr(model, "render", lambda prompts, *_, **__: [] if not prompts else pytest.fail("again"))
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


@pytest.mark.parametrize("histogram", [False, True])
def test_packed_statistics_unpack_to_the_same(histogram):
    generator = torch.Generator().manual_seed(0)
    stats = {
        name: GroupStats(
            lo=torch.randn(3, 4, generator=generator),
            hi=torch.randn(3, 4, generator=generator),
            sum_lo=torch.randn(3, generator=generator, dtype=torch.float64),
            sum_hi=torch.randn(3, generator=generator, dtype=torch.float64),
            calls=torch.tensor([1, 2, 3]),
            histogram=concatenate_steps([histogram_of(torch.randn(9, generator=generator)), empty_histogram(2)])
            if histogram
            else None,
        )
        for name in ("double_blocks.0.img_attn_qkv", "single_blocks.0.linear1")
    }

    unpacked = unpack_stats(pack_stats(stats))

    assert unpacked.keys() == stats.keys()
    for name, group in stats.items():
        for field in ("lo", "hi", "sum_lo", "sum_hi", "calls"):
            assert torch.equal(getattr(unpacked[name], field), getattr(group, field))
            assert getattr(unpacked[name], field).dtype == getattr(group, field).dtype
        assert (unpacked[name].histogram is not None) is histogram
        for field in ("exponent", "first", "counts") if histogram else ():
            assert torch.equal(getattr(unpacked[name].histogram, field), getattr(group.histogram, field))
