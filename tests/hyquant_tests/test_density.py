"""Arithmetic on densities, against numpy on finely sampled values and against numerical integration."""

import numpy as np
import pytest
import torch

from hyquant.numerics.density import (
    Density,
    central_interval,
    mean_squared_error,
    quantile,
    standard_deviation,
    sums_below,
)
from hyquant.numerics.qparams import QParams

EDGES = torch.linspace(-3.0, 2.0, 11, dtype=torch.float64)
COUNTS = torch.tensor([1, 0, 4, 10, 30, 25, 0, 0, 12, 3], dtype=torch.float64)
DENSITY = Density(EDGES, COUNTS)
PER_VALUE = 2000


@pytest.fixture(scope="module")
def samples():
    """2000 values, evenly spaced within its bin, for every one that was counted."""
    return np.concatenate(
        [
            left + (np.arange(int(count) * PER_VALUE) + 0.5) / (int(count) * PER_VALUE) * 0.5
            for left, count in zip(EDGES[:-1].tolist(), COUNTS.tolist(), strict=True)
            if count
        ]
    )


def test_standard_deviation_is_that_of_evenly_spread_values(samples):
    assert standard_deviation(DENSITY) == pytest.approx(samples.std(), rel=1e-5)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.8, 0.999])
def test_quantiles_are_those_of_evenly_spread_values(samples, share):
    assert quantile(DENSITY, share) == pytest.approx(np.quantile(samples, share), abs=1e-3)


def test_the_central_interval_leaves_out_as_many_at_either_end(samples):
    lo, hi = central_interval(DENSITY, 0.9)

    assert (samples < lo).mean() == pytest.approx(0.05, abs=1e-4)
    assert (samples > hi).mean() == pytest.approx(0.05, abs=1e-4)


def test_sums_below_limits_are_those_of_evenly_spread_values(samples):
    limits = torch.tensor([[-9.0, -3.0, -2.6, -1.0], [0.1, 0.7, 2.0, 9.0]], dtype=torch.float64)

    expected = np.maximum(limits.numpy()[..., None] - samples, 0).sum(axis=-1) / PER_VALUE
    assert sums_below(DENSITY)(limits).numpy() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [(5 / 255, 25.0), (0.004, 0.0), (0.2, -128.0), (0.7, 127.0), (3.0, 3.0)],
    ids=["whole range", "clamps both sides", "clamps below", "clamps above", "coarser than a bin"],
)
def test_squared_error_is_that_of_quantizing_evenly_spread_values(samples, scale, zero_point):
    q = np.clip(np.round(samples / scale + zero_point), -128, 127)
    expected = np.mean(((q - zero_point) * scale - samples) ** 2)

    qparams = QParams(*(torch.tensor([value], dtype=torch.float64) for value in (scale, zero_point)))

    assert mean_squared_error(DENSITY, qparams).item() == pytest.approx(expected, rel=1e-3)
