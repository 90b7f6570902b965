"""Laws that every entry of OBSERVERS obeys, for static ranges and for each row of a table per step."""

from itertools import permutations
from typing import NamedTuple

import numpy as np
import pytest
import torch

from hyquant.calibration.packing import pack_stats, unpack_stats
from hyquant.calibration.stats import GroupStats, act_range, call_stats, merge, stack_steps
from hyquant.calibration.store import Entry
from hyquant.clock import StepClock
from hyquant.config import LayerSelection, QuantConfig, W8A8Static, W8A8Timestep
from hyquant.errors import CalibrationError
from hyquant.models.names import LayerGroup
from hyquant.numerics.qparams import choose_qparams
from hyquant.observers import OBSERVERS
from hyquant.plan import build_plan
from hyquant.quantize import needs_histograms, quantize_, quantized_tensors, restore_

NUM_STEPS, NUM_CALLS, CHANNELS = 3, 4, 4
GROUP = LayerGroup("double_blocks.0.img_mlp.fc1", ("0",), CHANNELS, (2,))
SELECTION = LayerSelection(include=("*",))


class Table(NamedTuple):
    """A scheme that stores ranges, and the steps that each of its ranges is for."""

    linear: type[W8A8Static] | type[W8A8Timestep]
    options: dict[str, int | str]
    rows: list[range]


TABLES = {
    "static": Table(W8A8Static, {}, [range(NUM_STEPS)]),
    "timestep by step": Table(
        W8A8Timestep, {"timestep_sep": 0, "rows": "step"}, [range(t, t + 1) for t in range(NUM_STEPS)]
    ),
    "timestep by suffix": Table(
        W8A8Timestep, {"timestep_sep": 0, "rows": "suffix"}, [range(t, NUM_STEPS) for t in range(NUM_STEPS)]
    ),
}
PERCENTILES = {"everything": None, "nine tenths": 0.9}

every_observer = pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
every_percentile = pytest.mark.parametrize("percentile", PERCENTILES.values(), ids=PERCENTILES)


def call(seed: int, step_index: int = 0) -> torch.Tensor:
    """Make one call; later steps are wider and lie off centre, and each has one far value."""
    x = torch.randn(60, CHANNELS, generator=torch.Generator().manual_seed(seed)) * 2.0**step_index + step_index
    x[seed % 60, seed % CHANNELS] = 9.0 * (step_index + 1)
    return x


def calls_of(steps) -> list[tuple[int, torch.Tensor]]:
    return [(step, call(10 * step + number, step)) for step in steps for number in range(NUM_CALLS)]


def stats_of(calls, *, histogram: bool = True) -> GroupStats:
    """Merge single calls in the order given."""
    running: dict[int, GroupStats] = {}
    for step_index, x in calls:
        seen = call_stats(x, histogram=histogram)
        running[step_index] = merge(running[step_index], seen) if step_index in running else seen
    return stack_steps(running)


def bounds_of(stats: GroupStats, name: str, rows, percentile=None) -> list[tuple[float, float]]:
    """Return the range of every row, as exact numbers."""
    ranges = [act_range(stats, name, steps, percentile=percentile) for steps in rows]
    return [(lo.item(), hi.item()) for lo, hi in ranges]


def squared_error(x: np.ndarray, lo, hi) -> float:
    """Quantize with numpy in float64 by the formula of asymmetric int8."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = (hi - lo) / 255
    zero_point = -128 - round(lo / scale)
    q = np.clip(np.round(x / scale + zero_point), -128, 127)
    return float(np.mean(((q - zero_point) * scale - x) ** 2))


@every_observer
def test_the_table_key_is_the_name(observer):
    assert OBSERVERS[observer.name] is observer


@every_percentile
@every_table
@every_observer
def test_ranges_are_the_same_bits_however_calls_are_ordered_grouped_and_spread_over_ranks(observer, table, percentile):
    calls = calls_of(range(NUM_STEPS))
    expected = bounds_of(stats_of(calls), observer.name, table.rows, percentile)

    shuffled = [calls[index] for index in np.random.default_rng(0).permutation(len(calls))]
    for ranks in ([calls], [calls[::-1]], [shuffled], [calls[:2], calls[2:]], [shuffled[i::3] for i in range(3)]):
        parts = [unpack_stats(Entry(pack_stats({"x": stats_of(part)}).tensors, {}))["x"] for part in ranks]
        for order in permutations(parts):
            merged = order[0]
            for part in order[1:]:
                merged = merge(merged, part)
            assert bounds_of(merged, observer.name, table.rows, percentile) == expected


@every_percentile
@every_table
@every_observer
def test_ranges_lie_within_the_true_extremes_and_are_not_empty(observer, table, percentile):
    calls = calls_of(range(NUM_STEPS))

    bounds = bounds_of(stats_of(calls), observer.name, table.rows, percentile)

    for (lo, hi), steps in zip(bounds, table.rows, strict=True):
        everything = torch.cat([x for step, x in calls if step in steps])
        assert everything.min().item() <= lo < hi <= everything.max().item()


@every_table
@every_observer
def test_ranges_are_what_numpy_makes_of_the_calls_of_their_steps(observer, table):
    calls = calls_of(range(NUM_STEPS))

    bounds = bounds_of(stats_of(calls), observer.name, table.rows)

    for (lo, hi), steps in zip(bounds, table.rows, strict=True):
        chosen = [x.numpy().astype(np.float64) for step, x in calls if step in steps]
        values = np.concatenate(chosen).ravel()
        if observer.name == "minmax":
            assert (lo, hi) == (values.min(), values.max())
        elif observer.name == "mean_minmax":
            assert lo == pytest.approx(np.mean([x.min() for x in chosen]))
            assert hi == pytest.approx(np.mean([x.max() for x in chosen]))
        else:  # mix follows histogram here: no value lies 50 standard deviations away
            assert np.abs(values).max() < 50 * values.std()
            shares = np.linspace(0.4, 1.0, 61)
            best = min(squared_error(values, a * values.min(), b * values.max()) for a in shares for b in shares)
            # A histogram places a value within a bin only; of 240 values one alone can move the error by per cents.
            assert squared_error(values, lo, hi) <= 1.05 * best


@every_table
@every_observer
def test_a_percentile_keeps_the_central_share_of_all_values_and_limits_to_it(observer, table):
    calls = calls_of(range(NUM_STEPS))
    stats = stats_of(calls)

    whole = bounds_of(stats, observer.name, table.rows)
    narrow = bounds_of(stats, observer.name, table.rows, 0.9)

    for (lo, hi), (narrow_lo, narrow_hi), steps in zip(whole, narrow, table.rows, strict=True):
        values = torch.cat([x for step, x in calls if step in steps]).double().numpy()
        begin, end = np.quantile(values, [0.05, 0.95])
        # A bin is below 1/1000 of the range; between two of 240 values beyond the 95th there is up to 1/50 of it.
        slack = (values.max() - values.min()) / 50
        assert narrow_lo == pytest.approx(np.clip(lo, begin, end), abs=slack)
        assert narrow_hi == pytest.approx(np.clip(hi, begin, end), abs=slack)
        assert narrow_hi - narrow_lo < hi - lo


@every_percentile
@every_table
@every_observer
def test_quantize_stores_one_range_for_all_steps_or_one_row_for_each(observer, table, percentile):
    denoiser = torch.nn.Sequential(torch.nn.Linear(CHANNELS, 2))
    linear = table.linear(act_method=observer.name, percentile=percentile, **table.options)
    plan = build_plan([GROUP], QuantConfig(linear=linear, layers=SELECTION), num_steps=NUM_STEPS)
    stats = stats_of(calls_of(range(NUM_STEPS)), histogram=needs_histograms(plan))

    quantize_(denoiser, plan, {GROUP.name: stats}, StepClock())
    stored = quantized_tensors(denoiser)["0"]
    restore_(denoiser)

    bounds = torch.tensor(bounds_of(stats, observer.name, table.rows, percentile))
    expected = choose_qparams(bounds[:, 0], bounds[:, 1], symmetric=False, deploy_dtype="bfloat16")
    assert stored["input_scale"].shape == ((1,) if table.linear is W8A8Static else (NUM_STEPS, 1))
    assert torch.equal(stored["input_scale"].flatten(), expected.scale)
    assert torch.equal(stored["input_offset"].flatten(), expected.zero_point)


@every_observer
def test_a_step_without_records_is_an_error_that_names_it_and_the_layer(observer):
    denoiser = torch.nn.Sequential(torch.nn.Linear(CHANNELS, 2))
    stats = {GROUP.name: stats_of([*calls_of([0]), *calls_of([2])])}

    def quantize(rows, num_steps=NUM_STEPS) -> int:
        config = QuantConfig(linear=W8A8Timestep(act_method=observer.name, timestep_sep=0, rows=rows), layers=SELECTION)
        quantize_(denoiser, build_plan([GROUP], config, num_steps=num_steps), stats, StepClock())
        return len(quantized_tensors(denoiser)["0"]["input_scale"])

    with pytest.raises(CalibrationError, match=r"img_mlp\.fc1: .* records of step 1,"):
        quantize("step")
    with pytest.raises(CalibrationError, match=r"img_mlp\.fc1: .* records of steps 3 to 3,"):
        quantize("suffix", num_steps=4)
    assert quantize("suffix") == NUM_STEPS  # step 2 is later than step 1 and stands for it


@every_percentile
@every_observer
def test_a_multiplier_is_followed_exactly_or_refused(observer, percentile):
    calls, mul = calls_of([0]), torch.tensor([0.25, 1.0, 3.0, 2.0])

    if observer.follows_multiplier and percentile is None:
        expected = act_range(stats_of([(step, x * mul) for step, x in calls]), observer.name)
        assert act_range(stats_of(calls), observer.name, mul=mul) == expected
    else:
        with pytest.raises(CalibrationError, match="smoothed"):
            act_range(stats_of(calls), observer.name, mul=mul, percentile=percentile)


@every_percentile
@every_observer
def test_a_histogram_is_asked_for_where_one_is_needed_and_not_elsewhere(observer, percentile):
    stats = stats_of(calls_of([0]), histogram=False)
    linear = W8A8Static(act_method=observer.name, percentile=percentile)
    plan = build_plan([GROUP], QuantConfig(linear=linear, layers=SELECTION), num_steps=1)

    if needs_histograms(plan):
        with pytest.raises(CalibrationError, match="observe with histograms=True"):
            act_range(stats, observer.name, percentile=percentile)
    else:
        assert act_range(stats, observer.name, percentile=percentile) == act_range(
            stats_of(calls_of([0])), observer.name, percentile=percentile
        )


@every_observer
def test_values_that_are_not_finite_are_refused(observer):
    x = call(0)
    x[0, 0] = float("nan")

    with pytest.raises(CalibrationError, match="must be finite"):
        act_range(call_stats(x, histogram=True), observer.name)


@pytest.mark.parametrize("value", [0.0, 3.0, -0.7, 1e30, -1e-30])
@every_observer
def test_a_constant_input_has_itself_as_range(observer, value):
    x = torch.full((5, CHANNELS), value)

    lo, hi = act_range(call_stats(x, histogram=True), observer.name, percentile=0.9)

    assert lo.item() == pytest.approx(value, rel=2**-22)  # a bin is at least 2^-23 of the value wide
    assert hi.item() == pytest.approx(value, rel=2**-22)
