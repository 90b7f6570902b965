"""What a session needs around it: dumps of calls, files that run no code, the step of the loop, names per rank."""

import inspect
import os
import re
import stat
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from hyquant import (
    DumperManager,
    TimestepManager,
    get_disable_layer_names,
    get_rank,
    get_rank_suffix_file,
    safe_torch_load,
)
from hyquant.errors import CalibrationError, ConfigError, LayerMatchError
from hyquant.models.names import layer_groups
from hyquant.models.tiny import random_denoiser
from hyquant.session.records import read_calls, said_once
from tests.toys.original_dit import random_toy


class Scale(nn.Module):
    def forward(self, x, factor=2, *, shift=None):
        return x * factor if shift is None else x * factor + shift


class Sums(nn.Module):
    def forward(self, *terms, **named):
        return sum(terms) + sum(named.values())


def dumped(mode, module=None):
    module = module or Scale()
    return module, DumperManager(module, capture_mode=mode)


def test_args_are_positional_values_with_defaults():
    module, dumper = dumped("args")
    module(torch.ones(2), factor=3)
    module(torch.zeros(2))

    assert [[type(value) for value in record] for record in dumper.records] == [[torch.Tensor, int]] * 2
    assert [record[1] for record in dumper.records] == [3, 2]


def test_kwargs_are_values_by_name_with_defaults():
    module, dumper = dumped("kwargs")
    module(torch.ones(2), shift=torch.ones(1))

    (record,) = dumper.records
    assert list(record) == ["x", "factor", "shift"]
    assert record["factor"] == 2


def test_timestep_is_the_step_and_both_kinds_of_arguments():
    module, dumper = dumped("timestep")
    for step_index in (0, 4):
        TimestepManager.set_timestep_idx(step_index)
        module(torch.ones(2), shift=torch.ones(1))

    assert [record["timestep_idx"] for record in dumper.records] == [0, 4]
    assert dumper.records[0].keys() == {"tag", "timestep_idx", "module_name", "args", "kwargs"}
    assert dumper.records[0]["module_name"] == "Scale.forward"
    assert dumper.records[1]["kwargs"]["shift"].tolist() == [1]


def test_what_a_mode_cannot_hold_is_refused_by_name():
    module, dumper = dumped("args")
    with pytest.raises(ConfigError, match=r"takes positional arguments, but the call also has shift"):
        module(torch.ones(2), shift=torch.ones(1))
    dumper.stop()
    sums, _ = dumped("kwargs", Sums())

    with pytest.raises(ConfigError, match=r"takes arguments that have a name, but the call also has terms"):
        sums(torch.ones(2), b=torch.ones(1))


def test_an_unknown_mode_and_an_unknown_step_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="one of args, kwargs, timestep, but got 'all'"):
        DumperManager(Scale(), capture_mode="all")
    monkeypatch.setattr(TimestepManager, "_clock", type(TimestepManager._clock)())
    module, _ = dumped("timestep")

    with pytest.raises(CalibrationError, match=r"TimestepManager.set_timestep_idx\(step\)"):
        module(torch.ones(1))


def test_records_belong_to_the_instance_and_are_copies_that_a_later_change_does_not_reach():
    module, first = dumped("args")
    x = torch.ones(2)
    module(x)
    x += 1
    first.stop()
    _, second = dumped("args", module)
    module(x)

    assert [record[0].tolist() for record in first.records] == [[1, 1]]
    assert [record[0].tolist() for record in second.records] == [[2, 2]]
    second.reset()
    assert second.records == []


@pytest.mark.parametrize("mode", ["args", "kwargs", "timestep"])
def test_a_saved_dump_is_safe_to_load_and_gives_the_calls(mode, tmp_path):
    module, dumper = dumped(mode)
    TimestepManager.set_timestep_idx(1)
    module(torch.arange(3.0))
    path = tmp_path / "new" / "calib_data.pth"

    dumper.save(path)
    module(torch.zeros(3))
    loaded = safe_torch_load(path, map_location="cpu")
    calls = read_calls(loaded)

    assert len(loaded) == len(dumper.records) == 1
    assert type(torch.load(path, weights_only=True)[0]) is type(loaded[0])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [file.name for file in path.parent.iterdir()] == ["calib_data.pth"]
    (record,) = calls.records
    assert torch.equal([*record.args, *record.inputs.values()][0], torch.arange(3.0))
    assert (calls.have_steps, calls.num_steps) == ((True, 2) if mode == "timestep" else (False, 1))


def test_what_all_calls_share_is_stored_once(tmp_path):
    module, dumper = dumped("args")
    text = torch.ones(50_000)
    for _ in range(8):
        module(text)
    dumper.save(tmp_path / "dump.pth")

    assert (tmp_path / "dump.pth").stat().st_size < 1.2 * 4 * 50_000


def test_an_empty_dump_is_not_saved(tmp_path):
    _, dumper = dumped("args")

    with pytest.raises(CalibrationError, match="nothing was recorded"):
        dumper.save(tmp_path / "dump.pth")
    assert list(tmp_path.iterdir()) == []


def test_dumps_of_the_peer_are_read(tmp_path):
    """Written here as its DumperManager writes them: lists, OrderedDicts, nested tuples, ints."""
    rotary = (torch.ones(2), torch.zeros(2))
    calls = {
        "args": [[torch.ones(1), 7, rotary, None, True]],
        "kwargs": [OrderedDict(x=torch.ones(1), table=rotary, size=3)],
        "timestep": [
            {"tag": "", "timestep_idx": 3, "module_name": "A.forward", "args": [torch.ones(1), rotary], "kwargs": {}}
        ],
    }
    for name, entries in calls.items():
        path = tmp_path / f"calib_data_{name}.pth"
        torch.save(entries, path)
        (record,) = read_calls(safe_torch_load(path, map_location="cpu")).records

        values = [*record.args, *record.inputs.values()]
        assert torch.equal(values[0], torch.ones(1))
        assert any(isinstance(value, tuple) for value in values)
        assert record.step_index == (3 if name == "timestep" else 0)


class Later(nn.Module):
    def forward(self, x, *rest, factor=2, **named):
        return (x + sum(rest)) * factor + sum(named.values())


@pytest.mark.parametrize(
    ("module", "args", "named"),
    [
        (Scale(), (3,), {}),
        (Scale(), (), {"x": 3, "shift": 4}),
        (Sums(), (3, 4), {"five": 5, "six": 6}),
        (Sums(), (), {}),
        (Later(), (3,), {}),
        (Later(), (3, 4), {"factor": 5, "six": 6}),
    ],
    ids=repr,
)
def test_arguments_that_the_peer_dumps_twice_are_given_once(module, args, named):
    """Its "timestep" records hold `list(bound.args)` and beside them all of `bound.arguments`, with defaults.

    Source: msModelSlim, example/multimodal_sd/utils.py, InputCapture.
    """
    bound = inspect.signature(module.forward).bind(*args, **named)
    bound.apply_defaults()
    entry = {"timestep_idx": 2, "args": list(bound.args), "kwargs": dict(bound.arguments)}

    (record,) = said_once(read_calls([entry]).records, module)

    assert module(*record.args, **record.inputs) == module(*args, **named)
    assert record.step_index == 2


def test_arguments_that_are_said_once_stay_as_they_are():
    (record,) = read_calls([{"timestep_idx": 0, "args": [3], "kwargs": {"factor": 4}}]).records

    assert said_once([record], Scale()) == [record]


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_with_code_is_refused_without_running_it_or_asking(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    torch.save([Code(tmp_path / "ran")], tmp_path / "calib_data.pth")

    with pytest.raises(ConfigError, match="tensors and plain containers only"):
        safe_torch_load(tmp_path / "calib_data.pth")
    with pytest.raises(ConfigError, match="without running code"):
        safe_torch_load(tmp_path / "calib_data.pth", weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut short", "empty", "text", "missing"])
def test_a_damaged_file_is_refused_by_name(damage, tmp_path):
    path = tmp_path / "calib_data.pth"
    torch.save([torch.ones(1000)], path)
    whole = path.read_bytes()
    content = {"cut short": whole[: len(whole) // 2], "empty": b"", "text": b"not a file of torch"}
    path.write_bytes(content.get(damage, b"")) if damage != "missing" else path.unlink()

    with pytest.raises(ConfigError, match=re.escape(str(path))):
        safe_torch_load(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([torch.ones(1)], "entry 0 is a tensor"),
        ([[1], {"x": 1}], "entry 0 is of form 'args' and entry 1 of 'kwargs'"),
        ([{"timestep_idx": -1, "args": []}], "entry 0 has -1"),
        ([{"timestep_idx": True, "args": []}], "entry 0 has True"),
        ([{"timestep_idx": 0, "args": 3}], "a int"),
    ],
)
def test_calls_of_another_form_are_refused_by_place(entries, message):
    with pytest.raises(CalibrationError, match=re.escape(message)):
        read_calls(entries)


def test_the_step_is_any_integer_from_0_on():
    for step in (2, np.int64(3), torch.tensor(4)):
        TimestepManager.set_timestep_idx(step)
        assert TimestepManager.get_timestep_idx() == int(step)
    for wrong in (-1, 1.0, True, "1", None):
        with pytest.raises(ConfigError, match="must"):
            TimestepManager.set_timestep_idx(wrong)


def test_files_of_ranks_have_their_number():
    assert get_rank() == -1
    assert get_rank_suffix_file(base_name="calib_data", ext="pth", is_distributed=False, rank=-1) == "calib_data.pth"
    assert get_rank_suffix_file(base_name="calib_data", ext="pth", is_distributed=True, rank=3) == "calib_data_3.pth"
    with pytest.raises(ConfigError, match="0 or more, but got -1"):
        get_rank_suffix_file("calib_data", "pth", True, -1)


@pytest.mark.parametrize("make", [random_toy, lambda seed: random_denoiser(seed, torch.float32)], ids=["toy", "tiny"])
def test_disabled_names_are_all_linears_that_are_not_included_or_are_excluded(make):
    model = make(0)
    names = [group.name for group in layer_groups(model)]
    patterns = {"layer_include": ["*double_blocks*", "*single_blocks*"], "layer_exclude": ["*img_mod*", "*fc2*"]}

    disabled = get_disable_layer_names(model, **patterns)

    expected = [name for name in names if "_blocks." not in name or "img_mod" in name or "fc2" in name]
    assert disabled == expected
    assert "double_blocks.0.img_mod.linear" in disabled
    assert get_disable_layer_names(model) == []
    assert get_disable_layer_names(model, layer_include="*fc1*") == [name for name in names if "fc1" not in name]


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(LayerMatchError, match=r"did you mean '\*img_mod\*'"):
        get_disable_layer_names(random_toy(0), layer_exclude="*img_modd*")
