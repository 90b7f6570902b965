import pytest

from spaces.space import SearchSpace
from spaces.targets import left_out, narrowed

SPACE = SearchSpace.model_validate(
    {
        "name": "all",
        "strategies": ["dynamic", "m4", "fa3", "m4+fa3", "fp8"],
        "placements": ["multiplier", "fold"],
        "exclusions": {"none": []},
        "presets": [
            {"name": "folded", "params": {"strategy": "m4", "exclusion": "none", "placement": "fold"}},
            {"name": "multiplied", "params": {"strategy": "m4", "exclusion": "none", "placement": "multiplier"}},
            {"name": "fa3", "params": {"strategy": "fa3", "exclusion": "none"}},
        ],
    }
)


def test_this_library_executes_everything():
    assert left_out(SPACE, "hyquant") == {}
    assert narrowed(SPACE, "hyquant") == SPACE


@pytest.mark.parametrize(
    ("target", "strategies"),
    [
        ("mindie-sd-3.1/910b", ("dynamic", "m4")),
        ("mindie-sd-2.3/910b", ("dynamic", "m4", "fa3", "m4+fa3")),
        ("mindie-sd-3.1/950", ("dynamic", "m4", "fp8")),
    ],
)
def test_an_engine_gets_what_its_line_and_its_hardware_execute(target, strategies):
    space = narrowed(SPACE, target)

    assert space.strategies == strategies
    assert space.placements == ("multiplier",)
    assert {"placement fold", *(set(SPACE.strategies) - set(strategies))} == set(left_out(SPACE, target))


def test_what_is_left_is_a_valid_space_with_the_presets_that_still_have_a_meaning():
    space = narrowed(SPACE, "mindie-sd-3.1/910b")

    assert SearchSpace.model_validate(space.model_dump()) == space
    assert [(preset.name, preset.params.placement) for preset in space.presets] == [("multiplied", None)]


def test_a_space_of_which_nothing_is_left_is_refused():
    space = SPACE.model_copy(update={"strategies": ("fa3",), "presets": ()})

    with pytest.raises(ValueError, match="can execute none of"):
        narrowed(space, "mindie-sd-3.1/910b")
