"""Verdicts per metric from made-up scores: directions, bounds on either side, flags, what is missing."""

import math

import numpy as np
import pytest
from scipy import stats

from metrics.registry import find_metric
from search.margin_verdicts import PairedScores, margin_verdicts
from search.margins import CertificateConfig, Margin

PROMPTS = [f"prompt {index}" for index in range(32) for _ in range(2)]


def scores(margin, values, float_values=1.0):
    filled = [
        np.broadcast_to(np.asarray(given, dtype=float), len(PROMPTS)).tolist() for given in (values, float_values)
    ]
    return PairedScores(find_metric(margin.metric), margin, tuple(filled[0]), tuple(filled[1]))


def verdict(margin, values, float_values=1.0, *, alpha=0.05):
    (found,) = margin_verdicts([scores(margin, values, float_values)], PROMPTS, alpha=alpha)
    return found


def noise(scale, seed=0):
    return scale * np.random.default_rng(seed).standard_normal(len(PROMPTS))


@pytest.mark.parametrize(
    ("margin", "mean", "expected"),
    [
        (Margin(metric="clip_prompt", loss=0.1), 0.95, "PASS"),
        (Margin(metric="clip_prompt", loss=0.1), 1.2, "PASS"),
        (Margin(metric="clip_prompt", loss=0.1), 0.8, "FAIL"),
        (Margin(metric="clip_prompt", loss=0.1), 0.9, "INCONCLUSIVE"),
        (Margin(metric="psnr_db", min=30), 35, "PASS"),
        (Margin(metric="psnr_db", min=30), 25, "FAIL"),
        (Margin(metric="motion_energy_ratio", min=0.8, max=1.25), 1.0, "PASS"),
        (Margin(metric="motion_energy_ratio", min=0.8, max=1.25), 0.5, "FAIL"),
        (Margin(metric="motion_energy_ratio", min=0.8, max=1.25), 2.0, "FAIL"),
        (Margin(metric="motion_energy_ratio", min=0.8, max=1.25), 1.25, "INCONCLUSIVE"),
    ],
    ids=lambda value: value.in_words() if isinstance(value, Margin) else str(value),
)
def test_a_metric_is_judged_on_the_side_of_its_margin(margin, mean, expected):
    steady = noise(0.05) - noise(0.05).mean()

    assert verdict(margin, mean + steady).verdict == expected


def test_identical_renders_pass_every_margin():
    margins = (
        Margin(metric="clip_prompt", loss=1e-6),
        Margin(metric="clip_reference", min=0.999),
        Margin(metric="motion_energy_ratio", min=0.99, max=1.01),
        Margin(metric="collapsed", max=0.1),
    )
    same = [
        scores(margin, 0.0 if margin.metric == "collapsed" else 1.0, 0.0 if margin.metric == "collapsed" else 1.0)
        for margin in margins
    ]

    assert {found.verdict for found in margin_verdicts(same, PROMPTS, alpha=0.05)} == {"PASS"}


@pytest.mark.parametrize(("num_prompts", "expected"), [(3, "INCONCLUSIVE"), (28, "INCONCLUSIVE"), (29, "PASS")])
def test_prompts_that_all_score_the_same_pass_once_they_rule_out_one_bad_prompt_in_ten(num_prompts, expected):
    margins = (Margin(metric="flicker", max=0.2), Margin(metric="clip_prompt", loss=0.01))
    same = [
        PairedScores(find_metric(margin.metric), margin, (0.0,) * num_prompts, (0.0,) * num_prompts)
        for margin in margins
    ]
    verdicts = margin_verdicts(same, range(num_prompts), alpha=0.05)

    assert {found.verdict for found in verdicts} == {expected}
    assert [found.p for found in verdicts] == pytest.approx([0.9**num_prompts] * 2)
    assert {found.new_prompts for found in verdicts} == {None if expected == "PASS" else 29}


def test_the_p_value_of_symmetric_losses_is_close_to_students():
    """The correction for skewness makes it larger, never smaller."""
    values = 0.95 + noise(0.2, seed=3)
    means = values.reshape(32, 2).mean(axis=1)
    student = stats.ttest_1samp(1.0 - means, 0.1, alternative="less").pvalue
    found = verdict(Margin(metric="clip_prompt", loss=0.1), values)

    assert student <= found.p <= 3 * student
    assert found.mean == pytest.approx(values.mean())
    assert found.difference == pytest.approx(values.mean() - 1.0)
    assert found.low < found.difference < found.high


def test_flags_are_counted_by_prompt_and_bounded_exactly():
    flawed = np.zeros(64)
    flawed[[0, 1, 10]] = 1.0  # two clips of one prompt, one of another
    margin = Margin(metric="collapsed", max=0.25)
    found = verdict(margin, flawed, 0.0)

    assert found.p == pytest.approx(stats.binomtest(2, 32, 0.25, alternative="less").pvalue)
    assert found.verdict == "PASS"
    assert verdict(Margin(metric="collapsed", max=0.01), flawed, 0.0).verdict == "FAIL"
    assert verdict(Margin(metric="collapsed", loss=0.25), np.ones(64), 1.0).p == pytest.approx(0.75**32)


def test_too_few_spotless_prompts_say_how_many_a_new_certificate_needs():
    found = verdict(Margin(metric="collapsed", max=0.05), 0.0, 0.0)

    assert found.verdict == "INCONCLUSIVE"
    assert found.new_prompts == 59  # the rule of three: ln 0.05 / ln 0.95 = 58.4
    assert "a certificate on 59 new prompts should do" in found.reason


def test_one_flawed_prompt_of_many_asks_for_more_prompts():
    flawed = np.zeros(64)
    flawed[7] = 1.0
    found = verdict(Margin(metric="collapsed", max=0.1), flawed, 0.0)

    assert (found.verdict, found.new_prompts) == ("INCONCLUSIVE", 89)


def test_no_number_of_prompts_helps_where_as_many_are_flawed_as_may_be():
    flawed = np.zeros(64)
    flawed[[0, 2, 4, 6]] = 1.0
    found = verdict(Margin(metric="collapsed", max=0.125), flawed, 0.0)

    assert (found.verdict, found.new_prompts) == ("INCONCLUSIVE", None)
    assert "4 of 32 prompts have a flawed clip" in found.reason


def test_an_open_question_says_how_many_prompts_would_settle_it():
    values = 0.95 + noise(0.5, seed=1) - noise(0.5, seed=1).mean()
    found = verdict(Margin(metric="clip_prompt", loss=0.15), values)
    # Student's number for a standard deviation of 0.5 / sqrt(2) per prompt and a distance of 0.1 to the margin
    num_prompts = ((stats.norm.ppf(0.95) + stats.norm.ppf(0.8)) * np.std(values.reshape(32, 2).mean(axis=1)) / 0.1) ** 2

    assert found.verdict == "INCONCLUSIVE"
    assert 0.8 * num_prompts < found.new_prompts < 1.4 * num_prompts


def test_one_prompt_of_another_scene_never_asks_for_fewer_prompts_than_there_are():
    values = 0.999 + noise(0.0003)
    values[:2] = 0.35, 0.4
    found = verdict(Margin(metric="clip_reference", min=0.95), values)

    assert found.verdict == "INCONCLUSIVE"
    assert found.new_prompts > 32


def test_a_mean_beyond_the_margin_is_not_helped_by_more_prompts():
    values = 0.84 + noise(0.5, seed=1) - noise(0.5, seed=1).mean()
    found = verdict(Margin(metric="clip_prompt", loss=0.15), values)

    assert (found.verdict, found.new_prompts) == ("INCONCLUSIVE", None)
    assert "more prompts" in found.reason


def test_a_clip_without_a_score_fails_its_metric():
    values = np.ones(64)
    values[5] = math.nan
    found = verdict(Margin(metric="clip_prompt", loss=0.1), values)

    assert (found.verdict, found.mean, found.values[5]) == ("FAIL", None, None)
    assert found.reason == "1 of 64 clips have no finite score"


def test_several_metrics_are_corrected_together():
    one = scores(Margin(metric="clip_prompt", loss=0.1), 0.96 + noise(0.1, seed=5))
    other = scores(Margin(metric="clip_reference", min=0.9), 0.93 + noise(0.1, seed=6))
    alone = [margin_verdicts([scored], PROMPTS, alpha=0.05)[0].p_adjusted for scored in (one, other)]
    together = [found.p_adjusted for found in margin_verdicts([one, other], PROMPTS, alpha=0.05)]

    assert together == pytest.approx([2 * min(alone) if p == min(alone) else max(p, 2 * min(alone)) for p in alone])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "got neither; keep one"),
        ({"loss": 0.1, "min": 0.5}, "got both kinds"),
        ({"min": 2.0, "max": 1.0}, "leave room between min and max, but got 2 and 1"),
        ({"loss": 0.0}, "greater than 0"),
        ({"loss": math.inf}, "finite number"),
        ({"min": -math.inf}, "finite number"),
        ({"max": math.nan}, "finite number"),
    ],
)
def test_a_margin_is_one_statement(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Margin(metric="ssim", **fields)


def test_a_metric_has_one_margin():
    twice = (Margin(metric="ssim", min=0.5), Margin(metric="ssim", loss=0.1))
    with pytest.raises(ValueError, match=r"\['ssim'\] stand there twice"):
        CertificateConfig(prompts="mini:heldout", margins=twice)
