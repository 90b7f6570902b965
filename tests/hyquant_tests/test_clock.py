import pytest
import torch
from torch import nn

from hyquant.clock import StepClock, attach_clock
from hyquant.errors import ConfigError


def test_subscribers_hear_only_changes():
    clock = StepClock(num_steps=4)
    heard: list[int] = []
    clock.subscribe(heard.append)

    for step_index in (0, 0, 1, 3, 3):
        clock.set(step_index)

    assert heard == [0, 1, 3]
    assert clock.step_index == 3


def test_a_late_subscriber_hears_the_current_step_at_once():
    clock = StepClock()
    clock.set(2)
    heard: list[int] = []

    clock.subscribe(heard.append)

    assert heard == [2]


def test_a_subscriber_of_a_shorter_loop_is_not_told_where_a_longer_one_ended():
    clock = StepClock()
    clock.set(3)
    heard: list[int] = []

    clock.subscribe(heard.append, num_steps=3)
    clock.set(0)

    assert heard == [0]


def test_an_unsubscribed_callback_hears_nothing_more():
    clock = StepClock()
    heard: list[int] = []
    clock.subscribe(heard.append)
    clock.unsubscribe(heard.append)
    clock.unsubscribe(print)

    clock.set(1)

    assert heard == []


@pytest.mark.parametrize("step_index", [-1, 4])
def test_a_step_outside_the_loop_is_refused_with_rule_and_value(step_index):
    with pytest.raises(ConfigError, match=rf"\[0, 4\), but got {step_index}"):
        StepClock(num_steps=4).set(step_index)


def test_a_step_that_a_subscriber_refuses_is_not_taken():
    clock = StepClock()
    clock.set(0)

    def refuse(step_index: int) -> None:
        if step_index > 0:
            raise ConfigError("no")

    clock.subscribe(refuse)
    with pytest.raises(ConfigError):
        clock.set(1)

    assert clock.step_index == 0


def test_the_attached_clock_is_set_before_the_forward_and_left_alone_without_a_loop():
    steps: list[int | None] = [3, None]
    clock = StepClock()
    seen: list[int | None] = []

    class Denoiser(nn.Module):
        def forward(self, x):
            seen.append(clock.step_index)
            return x

    denoiser = Denoiser()
    handle = attach_clock(denoiser, clock, lambda: steps.pop(0))
    denoiser(torch.zeros(1))
    clock.set(1)
    denoiser(torch.zeros(1))
    handle.remove()
    denoiser(torch.zeros(1))

    assert seen == [3, 1, 1]
    assert steps == []
