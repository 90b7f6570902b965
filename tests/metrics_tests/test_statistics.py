"""The statistics of a certificate: hand numbers, scipy, and 1,000 simulated comparisons each."""

import math

import numpy as np
import pytest
from scipy import stats

from metrics.errors import MetricError
from metrics.statistics.clusters import cluster_means
from metrics.statistics.holm import holm_adjusted
from metrics.statistics.intervals import mean_interval
from metrics.statistics.non_inferiority import p_above, p_below, p_share_above, p_share_below
from metrics.statistics.sample_sizes import clusters_to_pass, clusters_to_pass_share, power_below
from metrics.statistics.verdict import combined, verdict_of
from tools.bench.held_out import LOSSES, SEEDS_PER_PROMPT, simulated

COMPARISONS = 1000


each_loss = pytest.mark.parametrize("kind", ["normal", "heavy tails", "few lose much", "few gain much", "lognormal"])


def test_values_of_one_prompt_are_one_observation():
    means = cluster_means([1.0, 2.0, 3.0, 7.0, 5.0], ["a", "b", "a", "b", "c"])

    assert means.tolist() == [2.0, 4.5, 5.0]


@pytest.mark.parametrize(
    ("values", "clusters", "sentence"),
    [([1.0], [], "1 values and 0 clusters"), ([], [], "there must be some"), ([1.0, np.nan], [0, 1], "1 of 2 are not")],
)
def test_what_cannot_be_averaged_is_refused(values, clusters, sentence):
    with pytest.raises(MetricError, match=sentence):
        cluster_means(values, clusters)


@each_loss
@pytest.mark.parametrize("num_prompts", [32, 64])
def test_a_model_exactly_at_the_margin_passes_in_at_most_63_of_1000_comparisons(kind, num_prompts):
    """63 is 5 % and two standard errors of a count of 1,000."""
    losses = simulated(kind, COMPARISONS, num_prompts, seed=1)

    assert (p_below(losses + 0.3, 0.3) <= 0.05).sum() <= 63


@each_loss
def test_an_equal_model_passes_in_at_least_775_of_1000_comparisons_at_the_stated_sample_size(kind):
    """775 is 80 % less two standard errors. The size is worked out from a pilot that the comparisons do not use."""
    pilot = simulated(kind, 1, 4000, seed=2)[0]
    stated = clusters_to_pass(pilot - pilot.mean(), 0.5)
    losses = simulated(kind, COMPARISONS, stated, seed=3)

    assert 15 <= stated <= 60
    assert (p_below(losses, 0.5) <= 0.05).sum() >= 775


def test_students_t_would_pass_too_many_models_at_the_margin():
    """Why there is a correction: scipy's t test on the same losses."""
    losses = simulated("few lose much", COMPARISONS, 32, seed=1)

    assert (stats.ttest_1samp(losses, 0.0, axis=1, alternative="less").pvalue <= 0.05).sum() > 63


@each_loss
def test_a_pass_is_a_pass_of_students_t_too(kind):
    losses = simulated(kind, 100, 16, seed=4)
    p_student = stats.ttest_1samp(losses, 0.4, axis=1, alternative="less").pvalue

    assert (p_below(losses, 0.4) >= p_student - 1e-12).all()


def test_the_correction_is_halls_polynomial():
    """One sample by hand: mean 1, deviations of squares 10 / 4, skewness 0.6 sqrt(6) before its adjustment."""
    sample = np.array([0.0, 0.0, 1.0, 0.0, 4.0])
    w, num = (1.0 - 3.0) / np.sqrt(12.0 / 4.0), 5
    g = stats.skew(sample, bias=False) + 1.5 * np.sqrt(6 / 5)
    corrected = w + g * w * w / 3 + g * g * w**3 / 27 + g / 30

    assert p_below(sample, 3.0) == pytest.approx(stats.t.cdf(np.sqrt(num) * max(w, corrected), 4))


def test_identical_renders_are_below_any_limit_above_zero_and_not_below_zero():
    assert p_below(np.zeros(29), 1e-9) <= 0.05
    assert p_below(np.zeros(32), 0.0) == 1.0
    assert p_above(np.zeros(32), 0.0) == 1.0
    assert p_above(np.full(32, 0.3), 0.1) == 0.0


@pytest.mark.parametrize("rounding", [0.0, 1e-9])
@pytest.mark.parametrize("num_prompts", [3, 28, 29, 64])
def test_prompts_without_a_difference_show_no_more_than_as_many_spotless_ones(num_prompts, rounding):
    """Of prompts of which one in ten is bad, so many show none in 0.9 ** n of all cases."""
    losses = 0.2 + rounding * np.random.default_rng(0).random((1, num_prompts))
    p = p_below(losses, 0.3)

    assert p == pytest.approx(stats.binom.pmf(0, num_prompts, 0.1))
    assert (p <= 0.05) == (num_prompts >= 29)


def test_above_mirrors_below():
    losses = simulated("lognormal", 1, 24, seed=5)[0]

    assert p_above(losses, -0.2) == p_below(-losses, 0.2)


def test_flags_are_counted_with_the_binomial_law():
    assert p_share_below(0, 32, 0.1) == pytest.approx(0.9**32)
    assert p_share_below(1, 3, 0.5) == pytest.approx((1 + 3) / 8)
    assert p_share_above(3, 3, 0.1) == pytest.approx(0.001)
    assert p_share_above(0, 3, 0.1) == pytest.approx(1.0)


def test_the_number_of_spotless_prompts_is_the_smallest_that_passes():
    num = clusters_to_pass_share(0.0, 0.1)

    assert num == 29
    assert p_share_below(0, num, 0.1) <= 0.05 < p_share_below(0, num - 1, 0.1)


def test_the_number_of_prompts_of_which_some_are_flagged_is_the_smallest_that_passes_in_80_of_100_cases():
    """Against sums of the binomial law, prompt number by prompt number."""

    def power(num, share, limit):
        def law(k, p):
            return math.comb(num, k) * p**k * (1 - p) ** (num - k)

        passing = [k for k in range(num + 1) if sum(law(j, limit) for j in range(k + 1)) <= 0.05]
        return sum(law(k, share) for k in passing)

    for share, limit, expected in ((0.0, 0.05, 59), (1 / 32, 0.1, 89), (0.1, 0.3, 28)):
        num = clusters_to_pass_share(share, limit)

        assert num == expected == next(n for n in range(3, 200) if power(n, share, limit) >= 0.8)
    assert clusters_to_pass_share(0.1, 0.1) is None
    assert clusters_to_pass_share(0.0, 0.9) == 3


@pytest.mark.parametrize("values", [[1e-300, 0, 0, 0], [1e-170, 0, 0]])
def test_an_interval_of_values_that_hardly_differ_is_their_mean(values):
    found = mean_interval(values, range(len(values)))

    assert found.low == found.mean == found.high


@pytest.mark.parametrize(("kind", "low", "high"), [("normal", 930, 970), ("few lose much", 915, 970)])
def test_the_interval_covers_the_true_mean_in_about_95_of_100_cases(kind, low, high):
    """32 prompts of two seeds; bootstrap intervals of skewed values are known to cover a few per cent less."""
    rng, draw = np.random.default_rng(6), LOSSES[kind]
    prompt_of = np.repeat(np.arange(32), SEEDS_PER_PROMPT).tolist()
    covered = 0
    for _ in range(COMPARISONS):
        values = draw(rng, (32, 1)) + draw(rng, (32, SEEDS_PER_PROMPT))
        found = mean_interval(values.ravel().tolist(), prompt_of, num_resamples=399)
        covered += found.low <= 0.0 <= found.high

    assert low <= covered <= high


def test_the_interval_of_normal_values_is_about_students():
    """Within a tenth of its width: resampling the values at hand adds noise of its own."""
    values = simulated("normal", 1, 32, seed=9)[0]
    found = mean_interval(values.tolist(), list(range(32)))
    low, high = stats.t.interval(0.95, 31, values.mean(), stats.sem(values))

    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_seeds_of_a_prompt_do_not_narrow_the_interval_as_prompts_would():
    """Eight copies of each value are no news."""
    values = simulated("normal", 1, 16, seed=7)[0].tolist()
    once = mean_interval(values, list(range(16)))
    copied = mean_interval(np.repeat(values, 8).tolist(), np.repeat(np.arange(16), 8).tolist())

    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert once.low < once.mean < once.high


def test_the_interval_of_what_does_not_vary_is_a_point():
    found = mean_interval([0.25, 0.25, 0.25], ["a", "b", "c"])

    assert (found.low, found.mean, found.high) == (0.25, 0.25, 0.25)


def test_holm_multiplies_by_what_is_left_and_never_falls():
    """The smallest of three counts three times, the next twice: 0.03, 0.08, and 0.05 lifted to 0.08."""
    adjusted = holm_adjusted({"a": 0.05, "b": 0.01, "c": 0.04})

    assert adjusted == pytest.approx({"a": 0.08, "b": 0.03, "c": 0.08})
    assert holm_adjusted({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_more_prompts_are_needed_the_closer_the_limit_is():
    losses = simulated("few lose much", 1, 500, seed=8)[0]
    losses -= losses.mean()
    needed = [clusters_to_pass(losses, limit) for limit in (1.0, 0.5, 0.25)]

    assert needed == sorted(needed)
    assert power_below(losses, 0.5, needed[1], alpha=0.05) >= 0.8 > power_below(losses, 0.5, needed[1] - 1, alpha=0.05)
    assert clusters_to_pass(losses + 1.0, 0.5) is None


def test_one_outlier_of_many_asks_for_no_fewer_prompts_than_were_not_enough():
    """Three of 32 mostly lack the outlier and pass; fresh draws of the stated number pass in 80 of 100 cases.

    76 % is 80 % less two standard errors of 2,000 draws, twice: the number is found by as many draws.
    """
    losses = np.append(0.001 * np.random.default_rng(0).standard_normal(31), 0.6)
    stated = clusters_to_pass(losses, 0.05, at_least=32)
    drawn = np.random.default_rng(1).choice(losses, (2000, stated))

    assert stated >= 32
    assert (p_below(drawn, 0.05) <= 0.05).mean() >= 0.76
    assert clusters_to_pass_share(0.0, 0.1, at_least=40) == 40


def test_a_verdict_needs_evidence_for_either_side():
    assert verdict_of(0.05, 0.9, 0.05) == "PASS"
    assert verdict_of(0.9, 0.01, 0.05) == "FAIL"
    assert verdict_of(0.4, 0.6, 0.05) == "INCONCLUSIVE"
    assert combined(["PASS", "PASS"]) == "PASS"
    assert combined(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert combined(["PASS", "INCONCLUSIVE", "FAIL"]) == "FAIL"


def test_the_interval_of_two_clusters_is_their_range_and_of_roundings_a_point():
    two = mean_interval([1.0, 3.0], ["a", "b"])
    rounded = mean_interval([1.0, 1.0 + 2e-16, 1.0], range(3))

    assert (two.low, two.mean, two.high) == (1.0, 2.0, 3.0)
    assert rounded.low == rounded.mean == rounded.high
