"""Two hosts, each with a store of its own, share one folder."""

import logging
import threading

import pytest
import torch

from hyquant.calibration.capture import capture_records, reference_clips
from hyquant.calibration.records import are_intact
from hyquant.calibration.shared import SharedStore, open_store
from hyquant.calibration.store import Store
from hyquant.models import load_model
from hyquant.models.base import RenderSettings

SETTINGS = RenderSettings(height=16, width=16, num_frames=5, num_steps=2)
PROMPTS, SEEDS = ["a red circle", "a blue square"], [1, 2]


@pytest.fixture
def hosts(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    return SharedStore(tmp_path / "a", shared), SharedStore(tmp_path / "b", shared), shared


@pytest.fixture
def counted(monkeypatch):
    """The tiny model and a list of every prompt it was asked to render or capture."""
    model, asked = load_model("tiny", "0", device="cpu"), []
    render, capture = model.render, model.capture
    monkeypatch.setattr(model, "render", lambda prompts, *a, **k: asked.extend(prompts) or render(prompts, *a, **k))
    monkeypatch.setattr(model, "capture", lambda prompts, *a, **k: asked.extend(prompts) or capture(prompts, *a, **k))
    return model, asked


def flip_a_byte(path):
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)


def build_all(model, store):
    clips = reference_clips(model, PROMPTS, SEEDS, SETTINGS, store)
    return clips, list(capture_records(model, PROMPTS, SEEDS, SETTINGS, store))


def test_the_second_host_renders_and_captures_nothing(hosts, counted):
    model, asked = counted
    clips, records = build_all(model, hosts[0])
    num_first = len(asked)
    clips_again, records_again = build_all(model, hosts[1])

    assert num_first == 4
    assert len(asked) == num_first
    assert all(torch.equal(a.video, b.video) for a, b in zip(clips, clips_again, strict=True))
    assert len(records) == len(records_again) == 4


@pytest.mark.parametrize("pattern", ["video-*.safetensors", "records-*/*.safetensors"])
def test_a_flipped_byte_in_the_shared_folder_is_built_again_and_replaced(hosts, counted, pattern):
    model, asked = counted
    build_all(model, hosts[0])
    asked.clear()
    flip_a_byte(sorted(hosts[2].glob(pattern))[0])
    build_all(model, hosts[1])
    num_rebuilt = len(asked)
    asked.clear()
    build_all(model, SharedStore(hosts[0].root.parent / "c", hosts[2]))

    assert num_rebuilt == 1
    assert asked == []


def test_a_host_whose_cache_was_filled_alone_gives_it_to_the_others(tmp_path, hosts, counted):
    model, asked = counted
    build_all(model, Store(hosts[0].root))
    build_all(model, hosts[0])
    asked.clear()
    build_all(model, hosts[1])

    assert asked == []


def test_an_absent_folder_is_one_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        store = SharedStore(tmp_path / "a", tmp_path / "nowhere")
        store.put("key", {"x": torch.ones(1)}, {})

    assert store.get("key") is not None
    assert store.get("other") is None
    assert [record.name for record in caplog.records] == ["hyquant.calibration.shared"]
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_hangs_is_left_alone(tmp_path, monkeypatch, caplog):
    forever = threading.Event()
    monkeypatch.setattr("hyquant.calibration.shared.Path.is_dir", lambda path: forever.wait(60))
    with caplog.at_level(logging.WARNING):
        store = SharedStore(tmp_path / "a", tmp_path, patience_s=0.1)
    forever.set()
    store.put("key", {"x": torch.ones(1)}, {})

    assert "must answer" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_takes_nothing_is_one_warning(hosts, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hosts[0]._shared, "put", full)
    with caplog.at_level(logging.WARNING):
        for key in ("one", "two"):
            hosts[0].put(key, {"x": torch.ones(1)}, {})

    assert [key for key in ("one", "two") if hosts[0].get(key) is None] == []
    assert len(caplog.records) == 1


def test_without_a_shared_folder_a_store_has_one_level(tmp_path):
    assert type(open_store(tmp_path, None)) is Store


def test_shared_records_are_whole(hosts, counted):
    model, _ = counted
    build_all(model, hosts[0])
    folders = [path for path in hosts[2].iterdir() if path.is_dir()]

    assert len(folders) == 2
    assert all(are_intact(folder) for folder in folders)
    assert [path for path in hosts[2].iterdir() if path.name.startswith(".")] == []
