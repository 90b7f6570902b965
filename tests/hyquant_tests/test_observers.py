"""The observers on distributions whose best range is known or can be searched for."""

import numpy as np
import pytest
import torch
from torch.ao.quantization import HistogramObserver

from hyquant.calibration.stats import act_range, call_stats

NUM_VALUES = 100_000


def squared_error(x: torch.Tensor, lo: float, hi: float) -> float:
    """Quantize with torch's own operator over a range widened to 0."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = (hi - lo) / 255
    q = torch.fake_quantize_per_tensor_affine(x, scale, int(np.clip(-128 - round(lo / scale), -128, 127)), -128, 127)
    return (q - x).double().square().mean().item()


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    """Put every thousandth value twelve times as far."""
    x[::1000] *= 12
    return x


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


DISTRIBUTIONS = {
    "normal": torch.randn(NUM_VALUES, generator=generator()),
    "uniform": torch.rand(NUM_VALUES, generator=generator()) * 3 - 1,
    "exponential": torch.empty(NUM_VALUES).exponential_(generator=generator()),
    "far from zero": torch.randn(NUM_VALUES, generator=generator()).abs() + 2,
    "negative": -torch.empty(NUM_VALUES).exponential_(generator=generator()),
    "after gelu": torch.nn.functional.gelu(3 * torch.randn(NUM_VALUES, generator=generator())),
    "outliers": with_outliers(torch.randn(NUM_VALUES, generator=generator())),
    "heavy tails": torch.empty(NUM_VALUES).log_normal_(generator=generator()),
}
every_distribution = pytest.mark.parametrize("x", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)


def histogram_range(x: torch.Tensor, act_method="histogram") -> tuple[float, float]:
    lo, hi = act_range(call_stats(x.reshape(-1, 10), histogram=True), act_method)
    return lo.item(), hi.item()


@every_distribution
def test_no_range_of_a_search_over_all_values_loses_one_percent_less(x):
    """The observer knows its values to a bin only, and tries widths in steps of 1/96 octave: well within 1 %."""
    lo, hi = x.min().item(), x.max().item()
    shares = np.geomspace(0.05, 1.0, 30)
    shares_lo = shares if lo < 0 else [1.0]
    shares_hi = shares if hi > 0 else [1.0]
    best = min(squared_error(x[::4], a * lo, b * hi) for a in shares_lo for b in shares_hi)

    found = squared_error(x[::4], *histogram_range(x[::4]))

    assert found <= 1.01 * best


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["normal", "uniform", "exponential"])
def test_the_range_is_near_the_one_of_torchs_histogram_observer(name):
    """Both minimize the squared error over 2048 bins, so bounds agree within 8 % of the width.

    Not closer, because the error is flat at its minimum: torch walks from the extremes inwards and stops at the first
    quantile that makes it worse, and its codes are 256 bin centres instead of 255 steps around an exact zero. So the
    errors are compared too: ours may exceed torch's by 0.5 %, its advantage for uniform values, whose last half step
    it cuts.
    """
    x = DISTRIBUTIONS[name]
    observer = HistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_affine)
    observer(x)
    expected = tuple(bound.item() for bound in observer._non_linear_param_search())

    actual = histogram_range(x)

    width = max(expected[1], 0) - min(expected[0], 0)
    assert actual == pytest.approx(expected, abs=0.08 * width)
    assert squared_error(x, *actual) <= 1.005 * squared_error(x, *expected)


def test_bounds_between_whole_numbers_are_kept():
    """MsModelSlim truncates [-3.8, 3.6] to [-3, 3]; evenly spread values need all of it."""
    lo, hi = histogram_range(torch.linspace(-3.8, 3.6, 10_000))

    assert lo == pytest.approx(-3.8, abs=7.4 / 255)
    assert hi == pytest.approx(3.6, abs=7.4 / 255)


def test_a_lone_outlier_is_clamped_by_least_squares():
    x = torch.cat((DISTRIBUTIONS["normal"][:9999], torch.tensor([30.0])))

    lo, hi = histogram_range(x)

    assert hi < 30
    assert squared_error(x, lo, hi) < squared_error(x, x.min().item(), 30.0)


@pytest.mark.parametrize(("outlier", "rule"), [(40.0, "histogram"), (60.0, "minmax")])
def test_mix_keeps_outliers_beyond_fifty_standard_deviations_and_weighs_others(outlier, rule):
    x = torch.cat((DISTRIBUTIONS["normal"][:99_999], torch.tensor([outlier])))
    ratio = (x.abs().max() / x.std()).item()

    assert (ratio <= 50) is (rule == "histogram")
    assert histogram_range(x, "mix") == histogram_range(x, rule)
    assert histogram_range(x, "histogram") != histogram_range(x, "minmax")


def test_symmetric_values_get_a_symmetric_range():
    x = DISTRIBUTIONS["exponential"]

    lo, hi = histogram_range(torch.cat((x, -x)))

    assert -lo == pytest.approx(hi, abs=2 * (hi - lo) / 255)  # the last search moves ranges by a step
