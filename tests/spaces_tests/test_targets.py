import pytest

from spaces.space import SearchSpace, load_space, shipped_spaces
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


LOW_BITS = SearchSpace.model_validate(
    {
        "name": "low",
        "strategies": ["w8a16", "w4a16", "w4a8", "w4a4_dynamic", "m3+w4a16", "m3+w4a8"],
        "group_sizes": [0, 32, 128],
        "exclusions": {"none": []},
        "presets": [
            {"name": "rows", "params": {"strategy": "w4a16", "exclusion": "none", "group_size": 0}},
            {"name": "groups", "params": {"strategy": "w4a16", "exclusion": "none", "group_size": 32}},
        ],
    }
)


@pytest.mark.parametrize("target", ["mindie-sd-3.1/910b", "mindie-sd-2.3/910b", "mindie-sd-3.1/950"])
def test_an_engine_gets_the_low_bits_that_it_executes(target):
    space = narrowed(LOW_BITS, target)

    assert space.strategies == ("w8a16", "w4a16")
    assert space.group_sizes == (0,)
    assert [(preset.name, preset.params.group_size) for preset in space.presets] == [("rows", None)]
    assert SearchSpace.model_validate(space.model_dump()) == space
    assert set(left_out(LOW_BITS, target)) == {
        *("w4a8", "w4a4_dynamic", "m3+w4a16", "m3+w4a8"),
        *("group_size 32", "group_size 128"),
    }


def test_a_space_with_groups_alone_has_no_w4a16_for_an_engine():
    space = LOW_BITS.model_copy(update={"group_sizes": (32,), "presets": ()})

    assert narrowed(space, "mindie-sd-3.1/910b").strategies == ("w8a16",)
    assert narrowed(space, "hyquant") == space


@pytest.mark.parametrize("target", ["mindie-sd-3.1/910b", "mindie-sd-2.3/910b", "mindie-sd-3.1/950"])
def test_a_space_that_only_folds_has_no_smoothing_for_an_engine(target):
    space = SPACE.model_copy(update={"placements": ("fold",), "presets": ()})

    assert "dynamic" in narrowed(space, target).strategies
    assert not any("m4" in strategy for strategy in narrowed(space, target).strategies)
    assert "add placement multiplier" in left_out(space, target)["m4"]
    assert narrowed(space, "hyquant") == space


@pytest.mark.parametrize("name", shipped_spaces())
def test_a_shipped_space_smooths_on_an_engine_without_folding(name):
    space = narrowed(load_space(name), "mindie-sd-3.1/910b")

    assert {"m3", "m4", "m6"} <= set(space.strategies)
    assert space.placements == ("multiplier",)
    assert any(preset.params.strategy in ("m3", "m4", "m6") for preset in space.presets)


def test_a_space_of_which_nothing_is_left_is_refused():
    space = SPACE.model_copy(update={"strategies": ("fa3",), "presets": ()})

    with pytest.raises(ValueError, match="can execute none of"):
        narrowed(space, "mindie-sd-3.1/910b")
