import math

import pytest
import torch

from metrics.base import Sample
from search.errors import TrialFailed
from search.result import MetricResult
from search.scoring import explained, judge, metric_results, objective_values, over_prompts
from search.study import Constraint, Objective


def test_a_drop_is_the_mean_of_per_prompt_losses_against_the_float_videos():
    float_results = metric_results({"clip_prompt": [0.30, 0.40]}, {}, prompts=["a", "b"])

    scores = {"clip_prompt": [0.25, 0.42], "clip_reference": [0.9, 1.0]}
    results = metric_results(scores, float_results, prompts=["a", "b"])

    assert results["clip_prompt_drop"].values == pytest.approx((0.05, -0.02))
    assert results["clip_prompt_drop"].mean == pytest.approx(0.015)
    assert "clip_reference_drop" not in results


def test_seeds_of_one_prompt_are_no_further_observations_of_an_interval():
    """Four seeds of each of eight prompts that hardly differ say as much as the means of the eight prompts."""
    per_prompt, per_seed = [0.1, 0.9, 0.3, 0.4, 0.2, 0.8, 0.5, 0.7], [-0.01, 0.0, 0.0, 0.01]
    videos = [value + shift for shift in per_seed for value in per_prompt]
    prompts = [f"prompt {index}" for index in range(8)]

    several = metric_results({"ssim": videos}, {}, prompts=prompts * 4)["ssim"]
    one = metric_results({"ssim": per_prompt}, {}, prompts=prompts)["ssim"]

    assert several.interval == pytest.approx(one.interval)
    assert several.mean == pytest.approx(one.mean)


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


def test_the_reason_of_an_infeasible_trial_names_the_collapses_of_its_videos():
    moving = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = [Sample("", torch.zeros_like(moving), moving), Sample("", moving, moving)]

    assert explained("collapsed must be at most 0, but is 0.5", samples) == (
        "collapsed must be at most 0, but is 0.5 (black in 1 of 2 videos)"
    )
    assert explained("ssim must be at least 0.9, but is 0.5", samples[1:]) == "ssim must be at least 0.9, but is 0.5"
    assert explained(None, samples) is None


@pytest.mark.parametrize(
    ("name", "worst"),
    [("clip_prompt", 0.1), ("clip_prompt_drop", 0.4), ("collapsed", 0.4)],
    ids=["higher is better", "a drop", "lower is better"],
)
def test_the_worst_prompt_is_the_one_on_the_bad_side(name, worst):
    results = {name: MetricResult(values=(0.3, 0.1, 0.4), mean=0.8 / 3, std=0.0)}

    assert over_prompts(results) == {name: pytest.approx(0.8 / 3), f"{name}_worst": worst}


def test_a_bound_on_the_worst_prompt_is_violated_where_the_mean_is_within_it():
    results = {"clip_prompt": MetricResult(values=(0.3, 0.1), mean=0.2, std=0.1)}

    judgement = judge(results, [Constraint(metric="clip_prompt_worst", min=0.15)], {})

    assert judgement.constraints == {"clip_prompt_worst": pytest.approx(0.05)}
    assert judgement.reason == "clip_prompt_worst must be at least 0.15, but is 0.1"


def _result(mean):
    return MetricResult(values=(mean,), mean=mean, std=0.0)
