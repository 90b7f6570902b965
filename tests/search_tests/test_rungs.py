"""When a trial may stop: exact bounds against brute force, the test against simulations that know the truth."""

import dataclasses
import itertools
import math
from statistics import fmean

import numpy as np
import pytest
from pydantic import ValidationError

from search.metric_names import worse
from search.outlook import NO_FLOORS, lost_constraints, outlook
from search.result import MetricResult
from search.rungs import MIN_PROMPTS, Scored, beaten_by, rung_ends
from search.study import Constraint, Objective, RungsConfig

SPEED = Objective(metric="latency_ratio", direction="minimize")
BOUNDED = (Objective(metric="clip_reference", direction="maximize"), SPEED)
UNBOUNDED = (Objective(metric="lpips", direction="minimize"), SPEED)


def over_prompts(values):
    return MetricResult(values=tuple(map(float, values)), mean=fmean(map(float, values)), std=0.0)


def scored(values, ratio, *, metric="lpips", number=7, kind="native"):
    return Scored(number, {metric: over_prompts(values)}, {"latency_ratio": ratio}, kind)


IN_DB = (Objective(metric="psnr_db", direction="maximize"), SPEED)


def in_db(values, ratio):
    return scored(values, ratio, metric="psnr_db")


def beaten(trial, front, *, objectives=UNBOUNDED, num_prompts=8, num_looks=1, alpha=0.01, floors=NO_FLOORS):
    return beaten_by(trial, front, objectives, num_prompts=num_prompts, num_looks=num_looks, alpha=alpha, floors=floors)


@pytest.mark.parametrize(
    ("prompts", "num_prompts", "world_size", "ends"),
    [
        ((4, 8), 8, 1, (4, 8)),
        ((4, 8), 32, 1, (4, 8, 32)),
        ((4, 8), 32, 3, (6, 9, 32)),
        ((4, 8), 8, 8, (8,)),
        ((4, 6), 32, 8, (8, 32)),
        ((), 8, 1, (8,)),
        ((4,), 2, 1, (2,)),
    ],
    ids=["the last is all", "two", "whole rounds of ranks", "one round is all", "two become one", "off", "few prompts"],
)
def test_rungs_end_after_whole_rounds_of_the_ranks_and_the_last_one_after_all(prompts, num_prompts, world_size, ends):
    assert rung_ends(prompts, num_prompts, world_size) == ends


@pytest.mark.parametrize("name", ["collapsed", "collapsed_worst", "clip_reference", "clip_reference_worst"])
def test_the_outlook_is_what_every_completion_of_the_prompts_gives(name):
    """Brute force over completions with the extreme values; the metrics lie in [0, 1] and [-1, 1]."""
    base = name.removesuffix("_worst")
    extremes = (0.0, 1.0) if base == "collapsed" else (-1.0, 1.0)
    known = (0.0, 1.0, 0.25)
    statistic = worse(base) if name != base else fmean

    finals = [statistic((*known, *rest)) for rest in itertools.product(extremes, repeat=3)]

    low, high = outlook(name, {base: over_prompts(known)}, 6)
    assert low == pytest.approx(min(finals))
    assert high == pytest.approx(max(finals))


def test_an_excess_is_lowest_where_the_clips_to_come_are_the_float_clips():
    """Their distance is 0 then, and the excess minus the floor of each prompt; without a floor nothing is known."""
    distances, floor = (0.3, 0.5), (0.1, 0.1, 0.2, 0.4)
    results = {"psnr_db_excess": over_prompts([d - f for d, f in zip(distances, floor, strict=False)])}

    low, high = outlook("psnr_db_excess", results, 4, {"psnr_db": floor})

    assert low == pytest.approx(fmean([*distances, 0.0, 0.0]) - fmean(floor))
    assert high == math.inf
    assert outlook("psnr_db_excess", results, 4) == (-math.inf, math.inf)
    assert outlook("psnr_db_excess_worst", results, 4, {"psnr_db": floor}) == (pytest.approx(0.4), math.inf)
    bounds = [Constraint(metric="psnr_db_excess", max=low - 0.01), Constraint(metric="psnr_db_excess", max=low + 0.01)]
    assert list(lost_constraints(bounds, results, {}, 4, {"psnr_db": floor})) == bounds[:1]


def test_a_member_beats_a_trial_by_excess_as_it_does_by_likeness():
    """Both objectives say the same; the floor of the prompts to come is what makes the first decidable."""
    objectives = (
        Objective(metric="clip_reference_excess", direction="minimize"),
        Objective(metric="latency_ratio", direction="minimize"),
    )
    floors = {"clip_reference": (0.0001,) * 8}
    member = scored([0.0009] * 8, 0.7, metric="clip_reference_excess")
    given = {"objectives": objectives, "floors": floors}

    far = beaten(scored([0.1] * 4, 0.8, metric="clip_reference_excess", number=None), [member], **given)
    near = beaten(scored([0.0014] * 4, 0.8, metric="clip_reference_excess", number=None), [member], **given)
    blind = beaten(scored([0.1] * 4, 0.8, metric="clip_reference_excess", number=None), [member], objectives=objectives)

    assert far is not None
    assert far.p == 0.0
    assert near is None
    assert blind is None


def test_a_bound_is_lost_exactly_when_no_completion_meets_it():
    results = {"collapsed": over_prompts([0, 1, 0, 0]), "psnr_db": over_prompts([20, 21, 22, 21])}
    bounds = [
        Constraint(metric="collapsed", max=0.0),
        Constraint(metric="collapsed", max=0.125),
        Constraint(metric="psnr_db", min=60.0),  # 100 dB, the cap, on all others would give 60.5
        Constraint(metric="psnr_db", min=61.0),
        Constraint(metric="psnr_db_worst", min=20.5),
        Constraint(metric="latency_ratio", max=0.9),
        Constraint(metric="weight_bytes", max=1.0),
    ]

    lost = lost_constraints(bounds, results, {"latency_ratio": 0.95}, 8)

    assert lost == {bounds[0]: 0.125, bounds[3]: 60.5, bounds[4]: 20.0, bounds[5]: 0.95}


def test_scores_that_are_not_finite_decide_nothing():
    results = {"psnr_db": MetricResult(values=(20.0, math.nan), mean=math.nan, std=math.nan)}

    assert lost_constraints([Constraint(metric="psnr_db", min=99.0)], results, {}, 8) == {}


def test_a_member_beats_a_trial_that_could_not_catch_up_with_perfect_prompts():
    member = scored([0.999] * 8, 0.7, metric="clip_reference")

    defeat = beaten(scored([0.9] * 4, 0.8, metric="clip_reference", number=None), [member], objectives=BOUNDED)
    close = beaten(scored([0.9985] * 4, 0.8, metric="clip_reference", number=None), [member], objectives=BOUNDED)

    assert (defeat.number, defeat.num_prompts, defeat.p) == (7, 4, 0.0)
    assert "beaten by trial 7" in defeat.in_words()
    assert "even if all other prompts were perfect" in defeat.in_words()
    assert close is None  # 0.9985 and then 1 is better than 0.999


MEMBER = scored([0.10, 0.12, 0.09, 0.11, 0.10, 0.12, 0.11, 0.10], 0.7)
WORSE = [0.60, 0.63, 0.58, 0.62]


@pytest.mark.parametrize(
    ("trial", "front", "is_beaten"),
    [
        (scored(WORSE, 0.8), [MEMBER], True),
        (scored(WORSE, 0.7), [MEMBER], True),
        (scored(WORSE, 0.6), [MEMBER], False),
        (scored(WORSE[:3], 0.8), [MEMBER], False),
        (scored(WORSE, 0.8, kind="simulated"), [MEMBER], False),
        (scored([0.11, 0.12, 0.10, 0.12], 0.8), [MEMBER], False),
        (scored(WORSE, 0.8), [], False),
        (scored(WORSE, 0.8), [scored([*[0.1, 0.12, 0.09, 0.11], *[1.5] * 4], 0.7)], False),
    ],
    ids=[
        "worse",
        "as fast",
        "faster",
        "too few prompts",
        "other kind of latency",
        "hardly worse",
        "no front",
        "ruins to come",
    ],
)
def test_a_trial_is_beaten_by_a_member_that_is_surely_better_and_no_slower(trial, front, is_beaten):
    assert (beaten(trial, front) is not None) is is_beaten


def test_a_member_timed_on_another_device_beats_nobody():
    """Threads count too: the ratio to float on eight cores is another quantity than on one."""
    trial, member = (dataclasses.replace(one, timed_on="cpu, 8 threads (x)") for one in (scored(WORSE, 0.8), MEMBER))

    assert beaten(trial, [member]) is not None
    assert beaten(trial, [dataclasses.replace(member, timed_on="cpu, 1 threads (x)")]) is None


def test_more_looks_and_more_members_ask_for_more_proof():
    trial, member = in_db([30.0, 31.0, 30.5, 30.2], 0.8), [35.0, 36.2, 35.3, 35.4, 35.0, 35.0, 36.0, 36.0]
    others = [scored(member, 0.7, metric="psnr_db", number=number) for number in range(40)]

    once = beaten(trial, others[:1], objectives=IN_DB)

    assert once.level == 0.01
    assert 0.0 < once.p < 0.01
    assert f"p = {once.p:.1g}" in once.in_words()
    assert beaten(trial, others, objectives=IN_DB, num_looks=2).level == 0.01 / 80
    assert beaten(trial, others * 20, objectives=IN_DB, num_looks=2) is None


def test_the_worst_prompt_is_compared_exactly_or_not_at_all():
    objectives = (Objective(metric="lpips_worst", direction="minimize"), SPEED)
    trial = Scored(None, {"lpips": over_prompts([0.1, 0.5, 0.1, 0.1])}, {"latency_ratio": 0.8}, "native")

    lpips_seen = beaten(trial, [scored([0.4] * 8, 0.7)], objectives=objectives)
    could_still_lose = beaten(trial, [scored([0.6] * 8, 0.7)], objectives=objectives)

    assert lpips_seen is not None
    assert could_still_lose is None


def test_who_has_an_objective_that_only_all_prompts_tell_is_not_beaten():
    """Latents are compared after all prompts, so neither figures of a trial nor results of a member have them."""
    latents = Objective(metric="latent_l2", direction="minimize")
    trial, member = scored([0.9] * 4, 0.8, metric="clip_reference"), scored([0.999] * 8, 0.7, metric="clip_reference")

    assert beaten(trial, [member], objectives=BOUNDED) is not None
    assert beaten(trial, [member], objectives=(*BOUNDED, latents)) is None


def test_fewer_than_four_prompts_are_no_rung():
    with pytest.raises(ValidationError, match="greater than or equal to 4"):
        RungsConfig(prompts=(2,))
    assert MIN_PROMPTS == 4


def qualities_of_a_study(rng, num_trials, num_prompts):
    """Latencies and qualities [trials, prompts]: what is faster loses more, prompts differ, clips are heavy-tailed.

    Returns:
        Latency ratios, qualities in dB, and true mean qualities.
    """
    ratios = rng.uniform(0.5, 1.0, num_trials)
    true = 50.0 - 20.0 * (1.0 - ratios) - rng.exponential(4.0, num_trials)
    hard = rng.normal(0.0, 3.0, num_prompts)
    return ratios, true[:, None] + hard + rng.standard_t(3, (num_trials, num_prompts)), true


def on_front(quality, ratios):
    """The oracle: indices that no other point dominates, by a double loop; more quality and less latency is better."""
    points = list(zip(quality, ratios, strict=True))
    return {
        i for i, own in enumerate(points) if not any(q >= own[0] and r <= own[1] and (q, r) != own for q, r in points)
    }


def replay(rng, num_prompts, num_trials=12):
    """Run one study with the rule; return the true front, the front of full trials, and who was stopped."""
    ratios, qualities, true = qualities_of_a_study(rng, num_trials, num_prompts)
    means = qualities.mean(axis=1)
    ends = rung_ends((4, 8), num_prompts, 1)
    done, stopped = {}, set()
    for trial in range(num_trials):
        members = list(done)
        chosen = on_front(means[members], ratios[members])
        front = [done[members[i]] for i in chosen]
        for end in ends[:-1]:
            own = in_db(qualities[trial, :end], ratios[trial])
            if beaten(own, front, objectives=IN_DB, num_prompts=num_prompts, num_looks=len(ends) - 1):
                stopped.add(trial)
                break
        else:
            done[trial] = in_db(qualities[trial], ratios[trial])
    return on_front(true, ratios), on_front(means, ratios), stopped


def test_true_members_of_the_front_survive_in_99_of_100_replays():
    """1,000 studies of 8 to 32 prompts; the truth is that of infinitely many prompts, and also that of full trials."""
    rng = np.random.default_rng(0)
    lost_true, lost_measured, num_stopped = 0, 0, 0
    for index in range(1000):
        true, measured, stopped = replay(rng, (8, 12, 16, 32)[index % 4])
        lost_true += bool(true & stopped)
        lost_measured += bool(measured & stopped)
        num_stopped += len(stopped)

    assert lost_true <= 10
    assert lost_measured <= 10
    assert num_stopped > 500  # a rule that never stops anybody would pass, too


NOISES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "t3": lambda rng, shape: rng.standard_t(3, shape),
    "difference of lognormals": lambda rng, shape: rng.lognormal(0, 1, shape) - rng.lognormal(0, 1, shape),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("num_prompts", [8, 32])
def test_a_trial_as_good_as_its_rival_is_stopped_in_one_of_100_cases_at_most(noise, num_prompts):
    rng = np.random.default_rng(1)
    num_stopped = 0
    for _ in range(1000):
        member, own = 40.0 + NOISES[noise](rng, (2, num_prompts))
        front, num_looks = [in_db(member, 0.7)], 2
        num_stopped += any(
            beaten(in_db(own[:n], 0.8), front, objectives=IN_DB, num_prompts=num_prompts, num_looks=num_looks)
            for n in (4, 6)
        )

    assert num_stopped <= 10


@pytest.mark.parametrize(("gap", "share"), [(10.0, 0.5), (20.0, 0.8)])
def test_a_clearly_worse_trial_is_stopped_at_the_first_rung(gap, share):
    """Worse by ten and by twenty times the spread of one clip, heavy-tailed, against three members."""
    rng = np.random.default_rng(2)
    num_stopped = 0
    for _ in range(200):
        easy = 50.0 + rng.normal(0.0, 3.0, 16)
        front = [in_db(easy + rng.standard_t(3, 16), ratio) for ratio in (0.6, 0.65, 0.7)]
        own = in_db(easy[:4] - gap + rng.standard_t(3, 4), 0.8)
        num_stopped += beaten(own, front, objectives=IN_DB, num_prompts=16) is not None

    assert num_stopped >= share * 200
