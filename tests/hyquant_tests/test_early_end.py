import pytest
import torch
from torch import nn

from hyquant.calibration.early_end import EarlyEnd
from hyquant.calibration.observe import observe
from hyquant.clock import StepClock
from hyquant.models.base import Record
from hyquant.models.names import layer_groups


def test_calls_end_when_all_was_seen_as_often_as_in_the_first_one():
    early_end, reached = EarlyEnd(), []
    for _ in range(3):
        with early_end.call():
            for name in ("a", "b", "a", "rest"):
                reached.append(name)
                if name != "rest":
                    early_end.saw(name)

    assert reached == ["a", "b", "a", "rest", *["a", "b", "a"] * 2]


def test_other_errors_pass():
    with pytest.raises(KeyError), EarlyEnd().call():
        raise KeyError


class TwiceCalled(nn.Module):
    """A denoiser that calls one Linear twice, the second time with larger values, and then another one."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last_calls = 0

    def forward(self, x):
        y = self.shared(x) + self.shared(10 * x)
        self.last_calls += 1
        return self.last(y)


def test_a_layer_that_runs_twice_is_observed_twice_and_what_follows_runs_once():
    denoiser = TwiceCalled()
    x = torch.arange(12.0).reshape(3, 4)
    records = [Record(step_index, 0, {"x": x * (step_index + 1)}) for step_index in range(3)]
    groups = [group for group in layer_groups(denoiser) if group.name == "shared"]

    stats = observe(denoiser, groups, records, StepClock(3), stop_early=True)

    assert torch.equal(stats["shared"].hi.amax(1), 10 * x.max() * torch.tensor([1.0, 2.0, 3.0]))
    assert stats["shared"].calls.tolist() == [2, 2, 2]
    assert denoiser.last_calls == 1
