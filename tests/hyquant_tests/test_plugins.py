"""Entries that other packages add to our tables."""

import sys

import pytest

from hyquant.devices import resolve_device
from hyquant.errors import ConfigError
from hyquant.models import MODELS, load_model
from hyquant.plugins import find_entry, known_names


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed distribution that offers a model and a device, as pip would leave it."""
    (tmp_path / "their_plugin.py").write_text(
        "from hyquant.devices.cpu import CpuDevice\n"
        "from hyquant.models.tiny import TinyVideoModel\n"
        "class Slow(CpuDevice):\n    name = 'slow'\n"
        "slow = Slow()\n"
        "def load(source, *, device, dtype):\n    return TinyVideoModel(len(source), device=device, dtype=dtype)\n"
    )
    info = tmp_path / "their_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[hyq.models]\ntheirs = their_plugin:load\ntiny = their_plugin:load\n[hyq.devices]\nslow = their_plugin:slow\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("their_plugin", None)


def test_a_model_of_another_package_loads(plugin):
    assert load_model("theirs", "abc", device="cpu").name == "tiny-3"


def test_a_device_of_another_package_is_found(plugin):
    assert resolve_device("slow").name == "slow"


def test_our_own_entry_wins_over_one_of_the_same_name(plugin):
    assert load_model("tiny", "7", device="cpu").name == "tiny-7"


def test_known_names_include_what_others_add(plugin):
    assert known_names(MODELS, "hyq.models") == ("hunyuan_video", "tiny", "theirs")


def test_an_unknown_kind_lists_the_known_ones_and_the_closest():
    with pytest.raises(ConfigError, match=r"hunyuan_video, tiny.*'hunyuan'.*did you mean 'hunyuan_video'"):
        load_model("hunyuan", "mini", device="cpu")


def test_an_unknown_dtype_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"float32, bfloat16, float16.*'int8'"):
        load_model("tiny", "0", device="cpu", dtype="int8")


def test_a_source_that_is_no_seed_is_refused():
    with pytest.raises(ConfigError, match=r"seed of its weights, .* but got 'mini'"):
        load_model("tiny", "mini", device="cpu")


def test_a_table_entry_needs_no_entry_point():
    assert find_entry({"a": 1}, "hyq.nothing", "a") == 1
