import pytest
import yaml
from pydantic import ValidationError

from hyquant.errors import ConfigError
from spaces.space import SearchSpace, ShareRange, load_space, shipped_spaces

SMALL = {
    "name": "small",
    "strategies": ["timestep", "dynamic"],
    "timestep_sep_share": {"low": 0.0, "high": 1.0, "step": 0.25},
    "exclusions": {"none": [], "mod": ["*_mod.*"]},
    "presets": [{"name": "first", "params": {"strategy": "dynamic", "exclusion": "mod"}}],
}


@pytest.fixture
def write_space(tmp_path):
    def write(**changes):
        path = tmp_path / "space.yaml"
        path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
        return path

    return write


def test_a_path_and_a_shipped_name_both_load(write_space):
    assert shipped_spaces() == ("hunyuan_video", "mini", "mini_ladder")
    assert {load_space(name).name for name in shipped_spaces()} == set(shipped_spaces())

    space = load_space(write_space())

    assert space == SearchSpace.model_validate(SMALL)
    assert space.act_methods == ("minmax", "mean_minmax")
    assert space.exclusions == {"none": (), "mod": ("*_mod.*",)}
    assert load_space(str(write_space())) == space


def test_an_unknown_name_lists_the_shipped_ones_and_the_closest():
    with pytest.raises(ConfigError, match=r"hunyuan_video, mini.*got 'hunyuan'; did you mean 'hunyuan_video'\?"):
        load_space("hunyuan")


def test_a_missing_file_is_one_sentence():
    with pytest.raises(ConfigError, match=r"no/such/space\.yaml is none; correct the path"):
        load_space("no/such/space.yaml")


@pytest.mark.parametrize(("text", "message"), [("a: [1", "must be YAML"), ("- 1", "must be a mapping .* got list")])
def test_a_file_that_is_no_mapping_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=message):
        load_space(path)


def test_all_problems_of_a_file_are_reported_at_once(write_space):
    path = write_space(strategies=["timestep", "fast"], act_methods=[], colour="red")

    with pytest.raises(ConfigError, match="breaks rules") as caught:
        load_space(path)

    assert all(field in str(caught.value) for field in ("strategies.1", "act_methods", "colour"))


def test_all_problems_of_the_presets_are_reported_at_once(write_space):
    presets = [
        {"name": "a", "params": {"strategy": "static", "exclusion": "mod", "act_method": "minmax"}},
        {"name": "b", "params": {"strategy": "timestep", "exclusion": "modd", "timestep_sep_share": 0.3}},
        {"name": "b", "params": {"strategy": "dynamic", "exclusion": "none", "act_method": "minmax"}},
    ]

    with pytest.raises(ConfigError) as caught:
        load_space(write_space(presets=presets, act_methods=["mean_minmax"]))

    for problem in (
        "strategy must be one of ['timestep', 'dynamic'], but got 'static'",
        "act_method must be one of ['mean_minmax'], but got 'minmax'",
        "exclusion must be one of ['none', 'mod'], but got 'modd'; did you mean 'mod'?",
        "strategy 'timestep' needs act_method; add it",
        "timestep_sep_share must lie on the grid from 0.0 to 1.0 by 0.25, but got 0.3",
        "strategy 'dynamic' has no act_method, but got 'minmax'; delete it",
        "presets must not repeat a value, but 'b' stands there more than once",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ["dynamic", "dynamic"]}, "strategies must not repeat a value, but 'dynamic'"),
        (
            {"exclusions": {"one": ["a", "b"], "two": ["b", "a"]}, "presets": []},
            "'one' and 'two' have the same patterns",
        ),
        ({"exclusions": {}, "presets": []}, "exclusions"),
        ({"exclusions": {"one": [""]}, "presets": []}, r"exclusions\.one\.0"),
        ({"include": []}, "include"),
    ],
    ids=["repeated strategy", "equal sets", "no set", "empty pattern", "nothing included"],
)
def test_a_space_that_repeats_or_lacks_choices_is_refused(write_space, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_space(write_space(**changes))


def test_a_space_is_frozen():
    space = load_space("mini")

    with pytest.raises(ValidationError, match="frozen"):
        space.name = "other"


@pytest.mark.parametrize(
    ("low", "high", "step"), [(0.0, 0.9, 0.1), (0.1, 0.7, 0.2), (0.0, 0.75, 0.25), (0.5, 0.5, 0.1)]
)
def test_a_share_range_contains_its_grid_and_nothing_between(low, high, step):
    grid = ShareRange(low=low, high=high, step=step)
    count = round((high - low) / step)

    assert all(grid.contains(low + k * step) for k in range(count + 1))
    assert not any(grid.contains(low + (k + 0.5) * step) for k in range(-1, count + 1))
    assert not grid.contains(low - step)
    assert not grid.contains(high + step)


@pytest.mark.parametrize(
    ("low", "high", "step", "message"),
    [
        (0.5, 0.2, 0.1, "low <= high must hold"),
        (0.0, 1.0, 0.3, "a whole number of steps"),
        (0.0, 25.0, 1.0, "less than or equal to 1"),
        (0.0, 1.0, 0.0, "greater than 0"),
    ],
)
def test_a_share_range_must_be_a_grid_of_shares(low, high, step, message):
    with pytest.raises(ValidationError, match=message):
        ShareRange(low=low, high=high, step=step)
