"""Moves of made-up clips: a metric moved if the candidate's clips are shown to have moved farther than float's."""

import math

import numpy as np
import pytest

from metrics.registry import find_metric
from search.margin_verdicts import PairedScores, margin_verdicts
from search.margins import Margin
from search.moves import PairMoves, judged_moves

PROMPTS = [f"prompt {index}" for index in range(32) for _ in range(2)]
NAMES = ("clip_prompt", "clip_reference", "psnr_db", "ssim", "motion_energy_ratio")


def found(moves):
    """Judge moves of metrics by name at an error rate of 5 %."""
    ones = (1.0,) * len(PROMPTS)
    scores = [PairedScores(find_metric(name), Margin(metric=name, min=0.5), ones, ones) for name in moves]
    verdicts = margin_verdicts(scores, PROMPTS, alpha=0.05)
    return {move.metric: move for move in judged_moves(verdicts, verdicts, moves, PROMPTS, alpha=0.05)}


def noise(seed, centre=0.0):
    values = np.random.default_rng(seed).standard_normal(len(PROMPTS))
    return values - values.mean() + centre


def test_moves_as_large_as_those_of_float_are_within_the_floor():
    steps = np.abs(noise(0)).tolist()
    move = found({"psnr_db": PairMoves(steps, steps)})["psnr_db"]

    assert move.moved == move.floor == pytest.approx(np.mean(steps))
    assert not move.is_beyond_floor


def test_larger_moves_than_those_of_float_are_beyond_the_floor():
    floats = np.abs(noise(0))
    candidate = floats + 1.0 + 0.1 * noise(1)
    move = found({"psnr_db": PairMoves(candidate.tolist(), floats.tolist())})["psnr_db"]

    assert move.moved == pytest.approx(move.floor + 1.0)
    assert move.is_beyond_floor


def test_what_moved_is_not_beyond_a_floor_that_is_unknown_and_a_clip_without_a_score_is_beyond_any():
    steps = [0.5 + 0.01 * index for index in range(len(PROMPTS))]
    still = [0.0] * len(PROMPTS)
    moves = found(
        {
            "psnr_db": PairMoves(steps, None),
            "ssim": PairMoves([math.nan, *steps[1:]], None),
            "motion_energy_ratio": PairMoves(still, None),
        }
    )

    assert moves["psnr_db"].floor is None
    assert moves["psnr_db"].is_beyond_floor is None
    assert moves["psnr_db"].in_words() == "moved, floor unknown"
    assert moves["motion_energy_ratio"].in_words() == "as before"
    assert (moves["ssim"].moved, moves["ssim"].is_beyond_floor) == (None, True)


def test_many_metrics_share_one_error_rate():
    """One metric that alone is just shown to have moved is not shown to have among five."""
    slight = PairMoves((noise(3) + 0.3).tolist(), [0.0] * len(PROMPTS))
    still = PairMoves([0.0] * len(PROMPTS), [0.0] * len(PROMPTS))
    alone = found({NAMES[0]: slight})
    together = found({NAMES[0]: slight, **dict.fromkeys(NAMES[1:], still)})

    assert alone[NAMES[0]].is_beyond_floor
    assert not any(move.is_beyond_floor for move in together.values())
