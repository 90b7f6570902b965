"""Records of any module's calls: what is recorded, stored and called again is what was called."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from hyquant.calibration.calls import capture_calls, output_tensor, replay
from hyquant.calibration.records import StoredRecords, write_records
from hyquant.clock import CallCounter, StepClock, attach_clock
from hyquant.errors import CalibrationError, ConfigError
from hyquant.models.base import Record
from tests.toys.original_dit import ToySize, euler_loop, random_toy, toy_inputs

SIZE = ToySize()


@pytest.fixture(scope="module")
def toy():
    return random_toy(0, SIZE)


class Anything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls = []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return args


def same(one, other) -> bool:
    """Compare nested values with their types, tensors bit by bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other or (one != one and other != other)


ODD_ARGS = (
    torch.arange(3, dtype=torch.int32),
    7,
    None,
    (torch.ones(2, dtype=torch.bfloat16), (torch.zeros(0), [torch.tensor(True), "text", -0.5])),
)
ODD_KWARGS = {"flag": True, "limits": (float("inf"), float("-inf")), "table": {"tuple": [1], "x": {}}, "none": ()}


def test_a_block_of_the_original_layout_is_recorded_and_called_again_bit_by_bit(toy):
    """Its call is positional and holds ints, int32 lengths and a tuple of tables."""
    block, outputs = toy.double_blocks[1], []
    clock = StepClock(6)
    attach_clock(toy, clock, CallCounter(6))
    handle = block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with capture_calls(block, clock, prompt_index=3) as records:
        euler_loop(toy, toy_inputs(SIZE, seed=1))
    handle.remove()

    again = [replay(block, record, torch.device("cpu")) for record in records]

    assert [record.step_index for record in records] == list(range(6))
    assert {record.prompt_index for record in records} == {3}
    assert records[0].args[3].dtype == torch.int32
    assert records[0].args[5] == 37
    assert same(again, outputs)


def test_records_go_to_disk_as_they_are_made_and_come_back(toy, tmp_path):
    clock = StepClock(6)
    attach_clock(toy, clock, CallCounter(6))
    inputs = toy_inputs(SIZE, seed=1)
    with capture_calls(toy.single_blocks[0], clock) as expected:
        euler_loop(toy, inputs)
    expected.append(Record(2, 0, ODD_KWARGS, ODD_ARGS))

    def capture(sink):
        with capture_calls(toy.single_blocks[0], clock, sink=sink) as kept:
            euler_loop(toy, inputs)
        assert kept == []
        sink(expected[-1])

    write_records(tmp_path / "prompt", capture)
    back = list(StoredRecords([tmp_path / "prompt"]))

    assert [record.step_index for record in back] == [0, 1, 2, 3, 4, 5, 2]
    for ours, theirs in zip(back, expected, strict=True):
        assert same(ours.args, theirs.args)
        assert same(dict(ours.inputs), dict(theirs.inputs))


def test_what_is_recorded_is_a_copy_and_equal_tensors_are_held_once():
    module, clock = Anything(), StepClock()
    text, latents = torch.ones(2), torch.zeros(3)
    with capture_calls(module, clock) as records:
        for step_index in range(3):
            clock.set(step_index)
            module(latents, text=(text,))
            latents += 1

    assert [record.args[0].tolist() for record in records] == [[0] * 3, [1] * 3, [2] * 3]
    assert records[0].inputs["text"][0] is records[2].inputs["text"][0] is not text
    module(latents)
    assert len(records) == 3


def test_odd_arguments_are_called_again_as_they_were():
    module, clock = Anything(), StepClock()
    clock.set(0)
    with capture_calls(module, clock) as records:
        module(*ODD_ARGS, **ODD_KWARGS)

    replay(module, records[0], torch.device("cpu"))

    (first, again) = module.calls
    assert same(list(first), list(again))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1, (object(),)), {}, r"positional argument 1\[0\] is a object"),
        ((), {"cache": {"a": [set()]}}, r"argument cache\['a'\]\[0\] is a set"),
        ((), {"cache": {1: 2}}, r"argument cache is a dict"),
        ((namedtuple("Point", "x")(1),), {}, r"positional argument 0 is a Point"),
        ((torch.float32,), {}, r"positional argument 0 is a dtype"),
    ],
)
def test_what_cannot_be_called_again_is_refused_by_name(args, kwargs, message):
    module, clock = Anything(), StepClock()
    clock.set(0)

    with capture_calls(module, clock), pytest.raises(CalibrationError, match=message):
        module(*args, **kwargs)


def test_a_call_without_a_step_is_refused():
    module = Anything()

    with capture_calls(module, StepClock()), pytest.raises(CalibrationError, match="clock was never set"):
        module(torch.ones(1))


def test_counting_calls_gives_the_step_run_after_run_with_two_calls_a_step():
    module, clock = Anything(), StepClock(3)
    counter = CallCounter(3, calls_per_step=2)
    attach_clock(module, clock, counter)
    seen = []
    for _ in range(8):
        module(0)
        seen.append(clock.step_index)
    counter.restart()
    module(0)

    assert seen == [0, 0, 1, 1, 2, 2, 0, 0]
    assert clock.step_index == 0


@pytest.mark.parametrize("sizes", [(0, 1), (3, 0)])
def test_a_loop_without_calls_is_refused(sizes):
    with pytest.raises(ConfigError, match="must be at least 1"):
        CallCounter(*sizes)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 1), lambda x: [x], lambda x: OrderedDict(x=x, y=2)])
def test_the_first_tensor_of_an_output_is_found(wrap):
    x = torch.ones(1)

    assert output_tensor(wrap(x)) is x


@pytest.mark.parametrize("output", [None, (), {}, "text", (1, torch.ones(1))])
def test_an_output_without_a_tensor_is_refused(output):
    with pytest.raises(CalibrationError, match="must return a tensor"):
        output_tensor(output)
