from search.control import control_values
from search.picks import Point, choose_picks, picks_of

OBJECTIVES = ("clip_reference", "latency_ratio")
DIRECTIONS = ("maximize", "minimize")
UNKNOWN = (None, None)


def points(*values: tuple[float, ...]) -> list[Point]:
    return [Point(number, v) for number, v in enumerate(values)]


def test_safe_is_best_quality_fast_is_lowest_latency_and_balanced_is_the_knee():
    # The line from (0.99, 1.0) to (0.80, 0.6): the point (0.97, 0.65) lies farthest off it.
    front = points((0.99, 1.0), (0.98, 0.9), (0.97, 0.65), (0.80, 0.6))

    assert choose_picks(front, OBJECTIVES, DIRECTIONS, UNKNOWN) == {"safe": 0, "balanced": 2, "fast": 3}


def test_one_point_alone_is_every_pick():
    picks = choose_picks(points((0.9, 0.8)), OBJECTIVES, DIRECTIONS, UNKNOWN)

    assert picks_of(0, picks) == ["safe", "balanced", "fast"]


def test_of_two_points_the_better_quality_is_balanced():
    picks = choose_picks(points((0.99, 0.9), (0.8, 0.5)), OBJECTIVES, DIRECTIONS, UNKNOWN)

    assert picks == {"safe": 0, "balanced": 0, "fast": 1}


def test_an_empty_front_has_no_picks():
    assert choose_picks([], OBJECTIVES, DIRECTIONS, UNKNOWN) == {}


def test_the_order_of_the_objectives_does_not_change_the_picks():
    values = [(0.99, 1.0), (0.97, 0.65), (0.80, 0.6)]
    forward = choose_picks(points(*values), OBJECTIVES, DIRECTIONS, UNKNOWN)
    backward = choose_picks(points(*[v[::-1] for v in values]), OBJECTIVES[::-1], DIRECTIONS[::-1], UNKNOWN)

    assert forward == backward


def test_a_study_without_latency_has_no_fast_pick():
    picks = choose_picks(
        points((0.9, 30.0), (0.8, 40.0)), ("clip_reference", "psnr_db"), ("maximize", "maximize"), UNKNOWN
    )

    assert set(picks) == {"safe", "balanced"}


def test_three_objectives_take_the_point_closest_below_the_plane_through_the_extremes():
    front = points((0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0), (0.2, 0.3, 0.2))
    picks = choose_picks(front, ("psnr_loss", "latency_s", "size"), ("minimize",) * 3, (None,) * 3)

    assert picks == {"safe": 0, "fast": 1, "balanced": 3}


def test_a_point_that_float_beats_is_not_offered():
    # Trial 0 is the closest to float, but slower than float: float itself is the better choice.
    front = points((0.9999, 1.39), (0.98, 0.9), (0.8, 0.6))

    assert choose_picks(front, OBJECTIVES, DIRECTIONS, (1.0, 1.0))["safe"] == 1


def test_a_cosine_that_rounding_lifts_above_1_does_not_beat_float():
    front = points((1.0 + 2e-7, 1.2), (0.98, 0.9))

    assert choose_picks(front, OBJECTIVES, DIRECTIONS, (1.0, 1.0))["safe"] == 1


def test_where_float_beats_every_point_all_are_offered():
    front = points((0.99, 3.0), (0.9, 2.0))

    assert choose_picks(front, OBJECTIVES, DIRECTIONS, (1.0, 1.0)) == {"safe": 0, "balanced": 0, "fast": 1}


def test_in_seconds_every_point_is_held_against_the_float_loop_that_was_timed_beside_it():
    """Trial 0 is slower than float on its device; trial 1 is not, though slower than float on the other one."""
    front = [Point(0, (0.99, 12.0), 10.0), Point(1, (0.98, 11.0), 20.0), Point(2, (0.97, 8.0), None)]
    objectives = ("clip_reference", "latency_s")

    assert choose_picks(front, objectives, DIRECTIONS, (1.0, None))["safe"] == 1


def test_float_competes_in_psnr_at_the_value_of_identical_videos():
    objectives = ("psnr_db", "latency_ratio")
    control = control_values(objectives, {})

    assert control == (100.0, 1.0)
    assert choose_picks(points((60.0, 1.2), (50.0, 0.8)), objectives, DIRECTIONS, control)["safe"] == 1


def test_float_beats_nobody_where_one_of_its_values_is_unknown():
    front = points((0.99, 1.2), (0.9, 0.8))

    assert choose_picks(front, OBJECTIVES, DIRECTIONS, (1.0, None))["safe"] == 0
