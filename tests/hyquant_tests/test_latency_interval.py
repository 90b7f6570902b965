"""Intervals of latency ratios."""

import numpy as np
import pytest

from hyquant.latency_interval import ratio_interval


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    """300 loops of two modes in 25 rounds that share the machine's noise; true ratio 0.5 * 0.8 + 0.5 * 0.6 = 0.7.

    Bootstrap intervals of medians are a little short; 0.88 is 95 % less five standard deviations of 300 tries.
    """
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        machine = random.lognormal(0.0, 0.1, 25)
        control, dynamic, static = (machine * base * random.lognormal(0.0, 0.05, 25) for base in (1.0, 0.8, 0.6))
        low, high = ratio_interval([(10, dynamic.tolist()), (10, static.tolist())], control.tolist())
        covered += low <= 0.7 <= high

    assert 0.88 < covered / 300 <= 1.0


def test_equal_rounds_have_an_interval_of_one_point():
    assert ratio_interval([(4, [0.3] * 5)], [0.6] * 5) == pytest.approx((0.5, 0.5))
