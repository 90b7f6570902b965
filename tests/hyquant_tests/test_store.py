"""The content-addressed store: whole entries or none."""

import json
import os
import stat
import threading
import time

import pytest
import torch

from hyquant.calibration.store import Entry, Store
from hyquant.errors import ConfigError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    store.put("key", TENSORS, {"n": 1})
    return store


def test_what_was_put_is_got(store):
    entry = store.get("key")

    assert entry.meta == {"n": 1}
    assert all(torch.equal(entry.tensors[name], tensor) for name, tensor in TENSORS.items())
    assert entry.tensors["b"].dtype == torch.int64


def test_a_key_that_was_never_put_is_missing(store):
    assert store.get("other") is None
    assert not store.has("other")


def test_taking_an_entry_sets_its_time_and_looking_whether_it_is_there_does_not(store):
    """The time of the last reading would not do: with relatime it moves once a day, with noatime never."""
    path = store.root / "key.json"
    os.utime(path, (1000, 1000))

    assert store.has("key")
    assert path.stat().st_mtime == 1000
    assert store.get("key") is not None
    assert time.time() - path.stat().st_mtime < 60


def test_files_are_not_readable_by_others(store):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in store.root.iterdir()}

    assert modes == {0o640}


@pytest.mark.parametrize("name", ["key.safetensors", "key.json"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-3], id="cut short"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], id="one bit changed"),
        pytest.param(lambda data: b"\xff" + data, id="not what it was"),
        pytest.param(None, id="deleted"),
    ],
)
def test_a_damaged_entry_counts_as_missing(store, name, damage):
    path = store.root / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))

    assert not store.has("key")


def test_changed_meta_counts_as_missing(store):
    path = store.root / "key.json"
    path.write_text(path.read_text().replace('"n": 1', '"n": 2'))

    assert store.get("key") is None


def test_an_entry_of_another_shape_counts_as_missing(store):
    (store.root / "key.json").write_text(json.dumps(["not", "an", "envelope"]))

    assert store.get("key") is None


def test_a_damaged_entry_is_built_again(store):
    (store.root / "key.safetensors").write_bytes(b"half")

    entry = store.get_or_build("key", lambda: Entry({"a": torch.ones(2)}, {"again": True}))

    assert entry.meta == {"again": True}
    assert store.get("key").meta == {"again": True}


def test_an_intact_entry_is_not_built_again(store):
    entry = store.get_or_build("key", lambda: pytest.fail("was built"))

    assert entry.meta == {"n": 1}


def test_nothing_is_left_when_writing_fails(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="Out of range float"):
        store.put("key", TENSORS, {"score": float("nan")})

    assert not store.has("key")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_many_writers_of_one_key_leave_one_whole_entry(tmp_path):
    store = Store(tmp_path)
    writers = [threading.Thread(target=store.put, args=("key", TENSORS, {"n": 1})) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert store.get("key").meta == {"n": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.json", "key.safetensors"]


@pytest.mark.parametrize("key", ["../escape", "a/b", "", ".hidden"])
def test_a_key_that_is_no_plain_name_is_refused(store, key):
    with pytest.raises(ConfigError, match="store key"):
        store.get(key)


def test_what_finds_no_room_is_returned_nevertheless(tmp_path, caplog):
    (tmp_path / "key.safetensors").mkdir()  # in the way of the file

    entry = Store(tmp_path).get_or_build("key", lambda: Entry(TENSORS, {"n": 1}))

    assert entry.meta == {"n": 1}
    assert "store entry key=key needs room" in caplog.text
