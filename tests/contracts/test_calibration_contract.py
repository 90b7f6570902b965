"""Laws that every kind of calibration obeys, for every scheme that stores ranges, smoothed or not."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, get_args

import pytest
import torch

from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.observe import observe
from hyquant.calibration.sequential import observe_sequential
from hyquant.calibration.stats import Stats
from hyquant.config import M4, QuantConfig, Smoothing, StoredRange, W8A8Static, W8A8Timestep
from hyquant.models.base import Record, RenderSettings
from hyquant.models.tiny import TinyVideoModel
from hyquant.modules.swap import swapped
from hyquant.plan import QuantPlan, build_plan
from hyquant.quantize import (
    needs_histograms,
    needs_smoothed_stats,
    quantize_,
    quantized_tensors,
    restore_,
    smoothing_multipliers,
)
from hyquant.schemes import SCHEMES

NUM_STEPS = 2


class Found(NamedTuple):
    stats: Stats
    smoothed_stats: Stats


def single_pass(model: TinyVideoModel, plan: QuantPlan, records: Iterable[Record]) -> Found:
    histograms = needs_histograms(plan)
    stats = observe(model.denoiser, model.groups(), records, model.clock, histograms=histograms)
    if not needs_smoothed_stats(plan):
        return Found(stats, {})
    mul = smoothing_multipliers(model.denoiser, plan, stats)
    smoothed = [group for group in model.groups() if group.name in mul]
    again = observe(model.denoiser, smoothed, records, model.clock, mul=mul, histograms=histograms)
    return Found(stats, again)


def sequential(model: TinyVideoModel, plan: QuantPlan, records: Iterable[Record]) -> Found:
    return Found(*observe_sequential(model.denoiser, plan, records, model.clock))


CALIBRATIONS: dict[str, Callable[[TinyVideoModel, QuantPlan, Iterable[Record]], Found]] = {
    "single_pass": single_pass,
    "sequential": sequential,
}
LINEARS: dict[str, StoredRange] = {
    "static": W8A8Static(),
    "static mean": W8A8Static(act_method="mean_minmax"),
    "timestep": W8A8Timestep(timestep_sep=1),
    "timestep mean": W8A8Timestep(timestep_sep=0, act_method="mean_minmax"),
    "timestep histogram": W8A8Timestep(timestep_sep=0, act_method="histogram", percentile=0.999, rows="suffix"),
}

pytestmark = [
    pytest.mark.parametrize("calibration", CALIBRATIONS),
    pytest.mark.parametrize("linear", LINEARS.values(), ids=LINEARS),
    pytest.mark.parametrize("smoothing", [None, M4()], ids=["plain", "m4"]),
]


@pytest.fixture(scope="module")
def model():
    return TinyVideoModel()


@pytest.fixture(scope="module")
def records(model):
    settings = RenderSettings(height=16, width=16, num_frames=1, num_steps=NUM_STEPS)
    return capture_in_memory(model, ["a red square", "two"], [0, 1], settings)


@pytest.fixture
def plan(model, calibration, linear, smoothing: Smoothing | None) -> QuantPlan:
    config = QuantConfig(linear=linear, smoothing=smoothing, calibration=calibration)
    return build_plan(model.groups(), config, num_steps=NUM_STEPS)


def call(model: TinyVideoModel, records: Iterable[Record]) -> torch.Tensor:
    outputs = []
    with torch.inference_mode():
        for record in records:
            model.clock.set(record.step_index)
            outputs.append(model.denoiser(**record.inputs, return_dict=False)[0])
    return torch.stack(outputs)


def test_every_kind_and_scheme_is_here(calibration, linear, smoothing):
    assert set(CALIBRATIONS) == set(get_args(QuantConfig.model_fields["calibration"].annotation))
    assert {each.kind for each in LINEARS.values()} == {name for name, each in SCHEMES.items() if each.needs_range}


def test_the_statistics_quantize_the_denoiser_and_calibrating_leaves_it_in_float(model, records, plan, calibration):
    """8 bits leave some percent of error on this model; inputs that belong to other layers would leave 100 %."""
    expected = call(model, records)

    found = CALIBRATIONS[calibration](model, plan, records)
    is_float, after = swapped(model.denoiser) is None, call(model, records)
    quantize_(model.denoiser, plan, found.stats, model.clock, smoothed_stats=found.smoothed_stats)
    actual = call(model, records)
    restore_(model.denoiser)

    assert is_float
    assert torch.equal(after, expected)
    assert 0 < ((actual - expected).norm() / expected.norm()).item() < 0.15


def test_the_order_of_records_does_not_matter(model, records, plan, calibration):
    """Of two prompts the sums of extremes have two terms, so that even they are equal bit by bit."""
    tensors = []
    for order in (records, records[::-1]):
        found = CALIBRATIONS[calibration](model, plan, order)
        quantize_(model.denoiser, plan, found.stats, model.clock, smoothed_stats=found.smoothed_stats)
        tensors.append(quantized_tensors(model.denoiser))
        restore_(model.denoiser)

    assert tensors[0].keys() == tensors[1].keys()
    for path, layer in tensors[0].items():
        assert all(torch.equal(tensors[1][path][name], tensor) for name, tensor in layer.items()), path
