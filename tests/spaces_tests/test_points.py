from itertools import product

from optuna.trial import FixedTrial

from hyquant.config import digest
from hyquant.sensitivity.ladder import Ladder
from spaces.points import count_points, points
from spaces.space import SearchSpace, load_space
from spaces.suggest import suggest

LADDER = Ladder(
    source="x", layers=("single_blocks.0.linear1", "single_blocks.0.linear2"), rungs=(("single_blocks.0.linear1",),)
)


def test_the_points_of_a_small_space_are_all_there_in_order():
    """Static asks for a range method and timestep for a share too, dynamic for neither; two exclusion sets each."""
    space = SearchSpace.model_validate(
        {
            "name": "s",
            "strategies": ["dynamic", "static", "timestep"],
            "timestep_sep_share": {"low": 0.0, "high": 0.5, "step": 0.25},
            "act_methods": ["minmax", "mix"],
            "exclusions": {"none": [], "tails": ["*fc2*"]},
        }
    )
    found = [tuple(params.values()) for params, _ in points(space, num_steps=4)]
    sets, methods, shares = ("none", "tails"), ("minmax", "mix"), (0.0, 0.25, 0.5)

    assert found == [
        *product(("dynamic",), sets),
        *product(("static",), sets, methods),
        *product(("timestep",), sets, methods, shares),
    ]


def test_every_point_replays_to_its_config():
    space = load_space("mini")
    for params, config in points(space, num_steps=20):
        assert digest(suggest(FixedTrial(params), space, num_steps=20)) == digest(config)


def test_a_ladder_and_switches_are_walked_through_too():
    space = SearchSpace(
        name="s", strategies=("dynamic",), exclusions="ladder", switches={"tails": ("*linear2",)}, ladder=LADDER
    )
    found = list(points(space, num_steps=4))

    assert [(params["float_rungs"], params["switch_tails"]) for params, _ in found] == list(
        product((0, 1), (False, True))
    )
    assert len({digest(config) for _, config in found}) == 4


def test_counting_stops_where_it_may():
    space = load_space("mini")

    assert count_points(space, num_steps=20, at_most=50) == 50
    assert count_points(space, num_steps=20, at_most=10**6) == sum(1 for _ in points(space, num_steps=20))
