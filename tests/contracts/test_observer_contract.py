"""Laws that every entry of OBSERVERS obeys."""

from itertools import permutations

import pytest
import torch

from hyquant.calibration.stats import act_range, call_stats, merge
from hyquant.errors import CalibrationError
from hyquant.observers import OBSERVERS

pytestmark = pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)


def call(seed: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def merged(calls):
    total = call_stats(calls[0])
    for x in calls[1:]:
        total = merge(total, call_stats(x))
    return total


def test_the_table_key_is_the_name(observer):
    assert OBSERVERS[observer.name] is observer


def test_the_range_does_not_depend_on_the_order_of_calls(observer):
    calls = [call(seed) for seed in range(4)]

    ranges = {tuple(bound.item() for bound in act_range(merged(order), observer.name)) for order in permutations(calls)}

    assert len(ranges) == 1


def test_the_range_lies_within_the_true_extremes_and_is_not_empty(observer):
    calls = [call(seed) for seed in range(4)]

    lo, hi = act_range(merged(calls), observer.name)

    everything = torch.cat(calls)
    assert everything.min() <= lo < hi <= everything.max()


def test_the_range_of_one_call_is_that_calls_extremes(observer):
    x = call(0)

    lo, hi = act_range(call_stats(x), observer.name)

    assert (lo.item(), hi.item()) == (x.min().item(), x.max().item())


def test_a_multiplier_is_followed_exactly_or_refused(observer):
    calls, mul = [call(seed) for seed in range(3)], torch.tensor([0.25, 1.0, 3.0, 2.0])

    if observer.follows_multiplier:
        expected = act_range(merged([x * mul for x in calls]), observer.name)
        assert act_range(merged(calls), observer.name, mul=mul) == expected
    else:
        with pytest.raises(CalibrationError, match="smoothed"):
            act_range(merged(calls), observer.name, mul=mul)
