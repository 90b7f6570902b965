"""Spaces whose exclusions are rungs of a ladder and switches: what is asked, and that equal points are one config."""

from fnmatch import fnmatchcase
from itertools import product

import optuna
import pytest
import yaml
from optuna.trial import FixedTrial

from hyquant.config import M4, FA3Int8, QuantConfig, W8A8Dynamic, W8A8Static, digest
from hyquant.errors import ConfigError
from hyquant.models.attentions import AttentionBlock
from hyquant.models.names import LayerGroup
from hyquant.plan import build_plan
from hyquant.sensitivity.ladder import Ladder
from spaces.space import SearchSpace, load_space, with_ladder
from spaces.suggest import preset_params, suggest

optuna.logging.set_verbosity(optuna.logging.WARNING)

STREAM = ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2", "mod.linear")
LAYERS = (
    *(f"double_blocks.0.{stream}_{kind}" for stream in ("img", "txt") for kind in STREAM),
    *(f"single_blocks.{block}.{kind}" for block in range(4) for kind in ("linear1", "linear2", "modulation.linear")),
)
SMOOTHED = ("attn_qkv", "mlp.fc1", "linear1")
RUNGS = (
    ("single_blocks.3.linear2",),
    ("single_blocks.2.linear2", "single_blocks.1.linear2"),
    ("single_blocks.0.linear2", "double_blocks.0.img_mlp.fc2"),
    tuple(name for name in LAYERS if name.endswith(SMOOTHED)),
)
FILE = {
    "name": "stairs",
    "strategies": ["dynamic", "static", "m4", "m6+timestep+fa3"],
    "act_methods": ["minmax"],
    "placements": ["multiplier", "fold"],
    "exclusions": "ladder",
    "switches": {
        "modulation": ["*_mod.*", "*modulation*"],
        "linear2": ["*linear2*"],
        "rest": ["*proj*", "*fc2*"],
    },
    "presets": [
        {"name": "seed", "params": {"strategy": "dynamic", "float_rungs": 0, "switches": ["modulation"]}},
        {"name": "static", "params": {"strategy": "static", "float_rungs": 2, "act_method": "minmax"}},
    ],
}
SPACE = SearchSpace.model_validate({**FILE, "ladder": Ladder(source="x", layers=LAYERS, rungs=RUNGS).model_dump()})


def config_of(rung: int, *switches: str, strategy: str = "dynamic", **params: object) -> QuantConfig:
    on = {f"switch_{name}": name in switches for name in SPACE.switches}
    params = {"act_method": "minmax", "placement": "multiplier", "timestep_sep_share": 0.5, **params}
    return suggest(FixedTrial({"strategy": strategy, "float_rungs": rung, **on, **params}), SPACE, num_steps=20)


def quantized(config: QuantConfig) -> set[str]:
    return {name for name in LAYERS if not any(fnmatchcase(name, pattern) for pattern in config.layers.exclude)}


def test_rungs_and_switches_leave_their_layers_in_float():
    assert config_of(0).layers.exclude == ()
    assert quantized(config_of(1)) == {*LAYERS} - {"single_blocks.3.linear2"}
    assert quantized(config_of(2)) == {*LAYERS} - {*RUNGS[0], *RUNGS[1]}
    assert quantized(config_of(1, "modulation")) == {name for name in LAYERS if "mod" not in name} - {*RUNGS[0]}
    assert config_of(2).layers.exclude == ("single_blocks.[123].linear2",)


def test_the_same_layers_are_the_same_config_however_they_were_chosen():
    """The switch covers what rungs 1 and 2 exclude, so three points are one quantization."""
    same = {config_of(rung, "linear2") for rung in range(3)}

    assert len(same) == 1
    assert len({digest(config) for config in same}) == 1
    assert config_of(3, "linear2") not in same


def test_smoothing_that_reaches_no_layer_is_no_smoothing():
    assert config_of(3, strategy="m4").smoothing == M4()
    assert config_of(4, strategy="m4") == config_of(4, strategy="dynamic")
    assert config_of(4, strategy="m4").linear == W8A8Dynamic()


def test_a_point_without_a_quantized_linear_is_the_control_or_attention_alone():
    everything = ("modulation", "linear2", "rest")

    assert config_of(4, *everything) == QuantConfig(linear=None)
    assert config_of(4, *everything, strategy="static") == QuantConfig(linear=None)
    assert config_of(4, *everything, strategy="m6+timestep+fa3") == QuantConfig(linear=None, attention=FA3Int8())


def test_every_point_makes_a_plan_that_quantizes_what_it_says():
    groups = [LayerGroup(name, (name,), in_features=8, out_features=(8,)) for name in LAYERS]
    names = ("double_blocks.0", *(f"single_blocks.{block}" for block in range(4)))
    blocks = [AttentionBlock(name, name, heads=2, head_dim=8) for name in names]
    switches = list(product(("", "modulation"), ("", "linear2"), ("", "rest")))
    for strategy, rung, on, placement in product(SPACE.strategies, range(5), switches, SPACE.placements):
        if placement == "fold" and "fa3" in strategy:
            continue  # refused where v is folded, whatever is excluded
        config = config_of(rung, *on, strategy=strategy, placement=placement)
        plan = build_plan(groups, config, num_steps=20, attentions=blocks)

        assert {layer.name for layer in plan.quantized} == (set() if config.linear is None else quantized(config))


def test_a_live_trial_is_asked_for_a_number_of_rungs_and_each_switch_and_replays():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    configs = []
    for _ in range(60):
        trial = study.ask()
        configs.append(suggest(trial, SPACE, num_steps=20))
        study.tell(trial, 0.0)

    rungs = {trial.params["float_rungs"] for trial in study.trials}
    assert rungs == set(range(5))
    assert all({"switch_modulation", "switch_linear2", "switch_rest"} < set(trial.params) for trial in study.trials)
    assert all("exclusion" not in trial.params for trial in study.trials)
    assert [suggest(trial, SPACE, num_steps=20) for trial in study.trials] == configs


def test_presets_come_back_with_every_switch_set():
    study = optuna.create_study()
    for preset in SPACE.presets:
        study.enqueue_trial(preset_params(SPACE, preset.name))
    seed, static = (suggest(study.ask(), SPACE, num_steps=20) for _ in SPACE.presets)

    assert seed == config_of(0, "modulation")
    assert (static.linear, static.layers) == (W8A8Static(), config_of(2).layers)
    assert preset_params(SPACE, "seed") == {
        "strategy": "dynamic",
        "float_rungs": 0,
        "switch_modulation": True,
        "switch_linear2": False,
        "switch_rest": False,
    }


def test_a_ladder_that_is_not_measured_is_one_sentence():
    space = SearchSpace.model_validate(FILE)

    assert space.exclusion_sets == {"rung_0": ()}
    with pytest.raises(ConfigError, match="that of stairs is not measured; run hyq-search sensitivity first"):
        suggest(FixedTrial({"strategy": "dynamic"}), space, num_steps=20)


def test_exclusion_sets_are_the_rungs_or_the_named_sets():
    mini = load_space("mini")

    assert list(SPACE.exclusion_sets) == ["rung_0", "rung_1", "rung_2", "rung_3", "rung_4"]
    assert SPACE.exclusion_sets["rung_2"] == config_of(2).layers.exclude
    assert mini.exclusion_sets == mini.exclusions


@pytest.mark.parametrize("changes", [{}, {"ladder": None}], ids=["measured", "not measured"])
def test_a_stored_space_is_the_space(changes):
    space = SPACE.model_copy(update=changes)

    assert SearchSpace.model_validate(space.model_dump(mode="json")) == space
    assert SearchSpace.model_validate_json(space.model_dump_json()) == space


def test_spaces_of_before_have_no_new_field():
    """So a stored study may be resumed although spaces have got a ladder since."""
    stored = load_space("mini").model_dump(mode="json")

    assert not {"switches", "ladder"} & set(stored)
    assert all(not {"float_rungs", "switches"} & set(preset["params"]) for preset in stored["presets"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclusions": {"none": []}, "presets": []}, "switches belongs to `exclusions: ladder`"),
        ({"exclusions": "laddr"}, "exclusions: Input should be 'ladder'"),
        ({"switches": {"empty": []}, "presets": []}, "switch 'empty' must have a pattern"),
        ({"switches": {"a": ["*x"], "b": ["*x"]}, "presets": []}, "'a' and 'b' have the same patterns"),
        ({"presets": [{"name": "p", "params": {"strategy": "dynamic"}}]}, "needs float_rungs; add it"),
        (
            {"presets": [{"name": "p", "params": {"strategy": "dynamic", "exclusion": "none", "float_rungs": 0}}]},
            "has no exclusion, but got 'none'",
        ),
        (
            {"presets": [{"name": "p", "params": {"strategy": "dynamic", "float_rungs": 0, "switches": ["linear"]}}]},
            "got 'linear'; did you mean 'linear2'?",
        ),
    ],
    ids=["named sets", "misspelled", "empty switch", "equal switches", "no rungs", "a set", "unknown switch"],
)
def test_what_does_not_belong_to_a_ladder_is_refused(tmp_path, changes, message):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({**FILE, **changes}))

    with pytest.raises(ConfigError) as caught:
        load_space(path)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"switches": {"none": ["*no_such*"]}, "presets": []},
            r"stairs breaks rules: pattern '\*no_such\*' of switch 'none' matched none of the 22 layers",
        ),
        (
            {"presets": [{"name": "p", "params": {"strategy": "dynamic", "float_rungs": 5}}]},
            "stairs breaks rules: preset 'p': float_rungs must be at most 4, but got 5",
        ),
    ],
    ids=["a switch of no layer", "a rung above the top"],
)
def test_what_does_not_fit_the_measured_ladder_is_refused(changes, message):
    assert SPACE.ladder is not None
    space = SearchSpace.model_validate({**FILE, **changes})

    with pytest.raises(ConfigError, match=message):
        with_ladder(space, SPACE.ladder)


def test_a_space_with_its_ladder_differs_in_nothing_else():
    assert SPACE.ladder is not None
    assert with_ladder(SearchSpace.model_validate(FILE), SPACE.ladder) == SPACE


def test_the_shipped_ladder_space_has_the_seeds_recipes_and_climbs():
    rungs = tuple((name,) for name in LAYERS[:8])
    space = with_ladder(load_space("mini_ladder"), Ladder(source="x", layers=LAYERS, rungs=rungs))
    configs = {
        preset.name: suggest(FixedTrial(preset_params(space, preset.name)), space, num_steps=20)
        for preset in space.presets
    }
    seed = ("*img_mod*", "*modulation*", "*fc2*")

    for name in ("timestep", "dynamic"):
        assert quantized(configs[name]) == {x for x in LAYERS if not any(fnmatchcase(x, p) for p in seed)}
    assert configs["timestep"].linear.timestep_sep == 10
    assert configs["fa3"].attention == FA3Int8()
    climbed = [quantized(configs[name]) for name in ("m4", "m4_rung_2", "m4_rung_4", "m4_rung_6")]
    assert climbed[0] > climbed[1] > climbed[2] > climbed[3]
    assert len(set(map(digest, configs.values()))) == len(configs)
