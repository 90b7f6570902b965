from dataclasses import fields

import pytest
import torch

from hyquant.calibration.histogram import Histogram
from hyquant.calibration.stats import TENSOR_FIELDS, GroupStats, act_range, call_stats, merge, select_steps, stack_steps
from hyquant.errors import CalibrationError


def call(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (5, 3)), generator=torch.Generator().manual_seed(seed))


def table(*, histogram: bool = False, **steps: torch.Tensor) -> GroupStats:
    """Build statistics from one call per step; the keyword s2 means step 2."""
    return stack_steps({int(name[1:]): call_stats(x, histogram=histogram) for name, x in steps.items()})


def assert_equal(a: GroupStats, b: GroupStats) -> None:
    for each in TENSOR_FIELDS:
        assert torch.equal(getattr(a, each.name), getattr(b, each.name)), each.name
    assert (a.histogram is None) == (b.histogram is None)
    if a.histogram is not None:
        for each in fields(Histogram):
            assert torch.equal(getattr(a.histogram, each.name), getattr(b.histogram, each.name)), each.name


def test_one_call_agrees_with_numpy_on_any_leading_shape():
    x = call(0, 2, 4, 3)

    stats = call_stats(x)

    assert stats.lo.tolist() == [x.numpy().min(axis=(0, 1)).tolist()]
    assert stats.hi.tolist() == [x.numpy().max(axis=(0, 1)).tolist()]
    assert stats.sum_lo.item() == x.min().item()
    assert stats.sum_hi.item() == x.max().item()
    assert stats.calls.tolist() == [1]


def test_merging_all_calls_equals_looking_at_them_together_for_extremes():
    calls = [call(seed) for seed in range(4)]
    merged = call_stats(calls[0])
    for x in calls[1:]:
        merged = merge(merged, call_stats(x))

    together = call_stats(torch.cat(calls))

    assert torch.equal(merged.lo, together.lo)
    assert torch.equal(merged.hi, together.hi)
    assert merged.calls.item() == 4


@pytest.mark.parametrize("histogram", [False, True])
def test_merge_is_commutative_and_associative_over_tables_of_different_length(histogram):
    a, b, c = (
        table(histogram=histogram, **steps)
        for steps in ({"s0": call(1)}, {"s0": call(2), "s2": 100 * call(3)}, {"s1": call(4)})
    )

    assert_equal(merge(a, b), merge(b, a))
    assert_equal(merge(merge(a, b), c), merge(a, merge(b, c)))


def test_merging_different_layers_is_refused():
    with pytest.raises(ValueError, match="equal channels, but got 3 and 4"):
        merge(call_stats(call(0)), call_stats(call(0, 5, 4)))


def test_statistics_with_and_without_histogram_do_not_merge():
    with pytest.raises(ValueError, match="both have a histogram or neither"):
        merge(table(s0=call(0), histogram=True), table(s0=call(1)))


def test_a_step_without_records_is_an_error_that_names_it():
    stats = table(s0=call(0), s2=call(1))

    with pytest.raises(CalibrationError, match="records of step 1,"):
        select_steps(stats, 1)
    with pytest.raises(CalibrationError, match="records of step 3,"):
        act_range(stats, "minmax", 3)
    with pytest.raises(CalibrationError, match="records of steps 3 to 4,"):
        act_range(stats, "minmax", range(3, 5))


def test_minmax_joins_all_steps_or_looks_at_one():
    first, second = call(0), call(1)
    stats = table(s0=first, s1=second)

    assert act_range(stats, "minmax")[0].item() == min(first.min().item(), second.min().item())
    assert act_range(stats, "minmax", 1)[1].item() == second.max().item()


def test_mean_minmax_is_the_mean_of_per_call_extremes():
    calls = [call(seed) for seed in range(3)]
    stats = merge(merge(call_stats(calls[0]), call_stats(calls[1])), call_stats(calls[2]))

    lo, hi = act_range(stats, "mean_minmax", 0)

    assert lo.item() == pytest.approx(sum(x.min().item() for x in calls) / 3)
    assert hi.item() == pytest.approx(sum(x.max().item() for x in calls) / 3)


def test_ranges_must_be_finite():
    x = call(0)
    x[0, 0] = float("inf")

    with pytest.raises(CalibrationError, match="must be finite"):
        act_range(call_stats(x), "minmax")
