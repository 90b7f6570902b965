"""Histograms: what they count, and that merging is exact."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from hyquant.calibration import histogram as module
from hyquant.calibration.histogram import (
    NUM_BINS,
    Histogram,
    concatenate_steps,
    empty_histogram,
    histogram_of,
    join_steps,
    merge_histograms,
)

NAMES = [each.name for each in fields(Histogram)]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (300,)), generator=torch.Generator().manual_seed(seed))


def same(a: Histogram, b: Histogram) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in NAMES)


EXTREMES = {
    "ordinary": normal(0),
    "narrow": 1 + normal(1) * 1e-4,
    "wide": normal(2) * 1e20,
    "tiny": normal(3) * 1e-30,
    "zeros": torch.zeros(7),
    "constant": torch.full((5,), -0.3),
    "barely negative": torch.tensor([-1e-38, 5e4]),
    "largest": torch.tensor([-3.38e38, 3.38e38, 1e-38, -1e-38]),
    "powers of two": torch.tensor([-4.0, 4.0, 2.0, -2.0]),
}
every_extreme = pytest.mark.parametrize("x", EXTREMES.values(), ids=EXTREMES)


@every_extreme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_those_of_numpy_on_the_same_grid(x, dtype):
    x = x.to(dtype)
    seen = histogram_of(x)

    width = 2.0 ** seen.exponent.item()
    edges = (seen.first.item() + np.arange(NUM_BINS + 1)) * width
    values = x.double().numpy()
    expected = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=NUM_BINS)
    assert seen.counts[0].tolist() == expected.tolist()
    assert edges[0] <= values.min() < edges[1]


def test_bins_are_the_narrowest_that_hold_all_values():
    for x in (normal(0), normal(1) * 37 + 5):
        seen = histogram_of(x)

        half = 2.0 ** (seen.exponent.item() - 1)
        assert np.floor(x.max().item() / half) - np.floor(x.min().item() / half) >= NUM_BINS


def test_bounds_are_not_truncated_to_whole_numbers():
    """A histogram over [-3, 3] would drop what lies beyond, as msModelSlim's does for this range."""
    x = torch.linspace(-3.8, 3.6, 1000)

    seen = histogram_of(x)

    width = 2.0 ** seen.exponent.item()
    assert seen.counts.sum().item() == 1000
    assert seen.first.item() * width == pytest.approx(-3.8, abs=width)
    assert (seen.first.item() + seen.counts[0].nonzero().amax().item()) * width == pytest.approx(3.6, abs=width)


@every_extreme
@pytest.mark.parametrize("y", EXTREMES.values(), ids=EXTREMES)
def test_merging_gives_the_histogram_of_the_union(x, y):
    merged = merge_histograms(histogram_of(x), histogram_of(y))

    assert same(merged, histogram_of(torch.cat((x, y))))
    assert same(merged, merge_histograms(histogram_of(y), histogram_of(x)))


def test_any_tree_of_merges_gives_the_histogram_of_the_union():
    generator = np.random.default_rng(0)
    values = torch.cat([normal(seed) * 10.0 ** (seed - 3) for seed in range(8)])
    for _ in range(5):
        shuffled = values[torch.from_numpy(generator.permutation(len(values)))]
        parts = [histogram_of(part) for part in shuffled.split(int(generator.integers(50, 900)))]
        while len(parts) > 1:
            one, other = (parts.pop(int(generator.integers(len(parts)))) for _ in range(2))
            parts.append(merge_histograms(one, other))

        assert same(parts[0], histogram_of(values))


def test_joining_steps_gives_the_histogram_of_all_of_them():
    rows = [normal(0), normal(1) * 50, normal(2) * 0.1]
    table = concatenate_steps([histogram_of(rows[0]), empty_histogram(1), *map(histogram_of, rows[1:])])

    assert same(join_steps(table), histogram_of(torch.cat(rows)))


@every_extreme
def test_an_empty_histogram_is_neutral(x):
    seen = histogram_of(x)

    assert same(merge_histograms(seen, empty_histogram(1)), seen)
    assert same(merge_histograms(empty_histogram(1), seen), seen)
    assert same(merge_histograms(empty_histogram(2), empty_histogram(2)), empty_histogram(2))


def test_counting_in_chunks_changes_nothing(monkeypatch):
    x = normal(0, 7, 11, 13)
    whole = histogram_of(x)
    monkeypatch.setattr(module, "_CHUNK", 10)

    assert same(histogram_of(x), whole)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite_leave_it_empty(value):
    assert same(histogram_of(torch.tensor([1.0, value])), empty_histogram(1))


def test_different_numbers_of_steps_do_not_merge():
    with pytest.raises(ValueError, match="equal steps, but got 1 and 2"):
        merge_histograms(empty_histogram(1), empty_histogram(2))
