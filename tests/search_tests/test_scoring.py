import math

import pytest

from search.errors import TrialFailed
from search.result import MetricResult
from search.scoring import judge, metric_results, objective_values
from search.study import Constraint, Objective


def test_a_drop_is_the_mean_of_per_prompt_losses_against_the_float_videos():
    float_results = metric_results({"clip_prompt": [0.30, 0.40]}, {})

    results = metric_results({"clip_prompt": [0.25, 0.42], "clip_reference": [0.9, 1.0]}, float_results)

    assert results["clip_prompt_drop"].values == pytest.approx((0.05, -0.02))
    assert results["clip_prompt_drop"].mean == pytest.approx(0.015)
    assert "clip_reference_drop" not in results


def test_violations_are_told_for_every_bound_and_named_in_words():
    results = {"collapsed": _result(0.5), "ssim": _result(0.9)}
    bounds = [Constraint(metric="collapsed", max=0.0), Constraint(metric="ssim", min=0.5)]

    judgement = judge(results, bounds, {})

    assert judgement.constraints == {"collapsed": 0.5, "ssim": pytest.approx(-0.4)}
    assert judgement.reason == "collapsed must be at most 0, but is 0.5"


def test_scores_of_a_collapsed_video_that_are_not_finite_are_left_out():
    results = {"collapsed": _result(1.0), "ssim": _result(math.nan)}

    judgement = judge(results, [Constraint(metric="collapsed", max=0.0), Constraint(metric="ssim", min=0.5)], {})

    assert not judgement.is_feasible
    assert set(judgement.metrics) == {"collapsed"}
    assert set(judgement.constraints) == {"collapsed"}


def test_scores_that_are_not_finite_without_a_violation_fail_the_trial():
    with pytest.raises(TrialFailed, match="scores must be finite, but ssim are not"):
        judge({"ssim": _result(math.nan)}, [], {})


def test_a_bound_on_latency_is_held_only_once_latency_is_measured():
    bounds = [Constraint(metric="latency_ratio", max=0.9)]

    assert judge({}, bounds, {}).is_feasible
    assert not judge({}, bounds, {"latency_ratio": 1.0}).is_feasible


def test_objective_values_come_in_the_order_of_the_study():
    objectives = [
        Objective(metric="latency_ratio", direction="minimize"),
        Objective(metric="ssim", direction="maximize"),
    ]

    assert objective_values(objectives, {"ssim": _result(0.9)}, {"latency_ratio": 0.7}) == (0.7, 0.9)


def _result(mean):
    return MetricResult(values=(mean,), mean=mean, std=0.0)
