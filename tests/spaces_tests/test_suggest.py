import optuna
import pytest
from optuna.trial import FixedTrial, TrialState

from hyquant.config import (
    M4,
    M6,
    W4A8,
    W4A16,
    W8A16,
    FA3Fp8,
    FA3Int8,
    QuantConfig,
    W4A4Dynamic,
    W8A8Dynamic,
    W8A8Static,
    W8A8Timestep,
    digest,
)
from hyquant.errors import ConfigError
from spaces.space import LADDER, SearchSpace, load_space, shipped_spaces
from spaces.strategy import strategy_of
from spaces.suggest import preset_params, suggest

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = SearchSpace.model_validate(
    {
        "name": "small",
        "strategies": ["timestep", "dynamic", "static", "m4"],
        "timestep_sep_share": {"low": 0.0, "high": 1.0, "step": 0.25},
        "include": ["*single_blocks*"],
        "exclusions": {"none": [], "mod": ["*modulation*", "*linear2*"]},
    }
)


WITH_NAMED_SETS = [name for name in shipped_spaces() if load_space(name).exclusions != LADDER]


@pytest.mark.parametrize("name", WITH_NAMED_SETS)
def test_replaying_a_frozen_or_fixed_trial_rebuilds_the_equal_config(name):
    space = load_space(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=7))
    asked: list[tuple[int, QuantConfig]] = []
    for _ in range(60):
        trial = study.ask()
        asked.append((trial.number, suggest(trial, space, num_steps=20)))
        study.tell(trial, 0.0)

    for number, config in asked:
        frozen = study.trials[number]
        assert suggest(frozen, space, num_steps=20) == config
        assert digest(suggest(FixedTrial(frozen.params), space, num_steps=20)) == digest(config)
    assert {type(config.linear) for _, config in asked} == {W8A8Dynamic, W8A8Static, W8A8Timestep}


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("timestep", {"act_method": "minmax", "timestep_sep_share": 0.5}),
        ("static", {"act_method": "mean_minmax"}),
        ("dynamic", {}),
        ("m4", {}),
    ],
)
def test_parameters_are_asked_only_where_they_mean_something(strategy, more):
    study = optuna.create_study()
    study.enqueue_trial({"strategy": strategy, "exclusion": "mod", **more})
    trial = study.ask()
    suggest(trial, SPACE, num_steps=20)

    assert trial.params == {"strategy": strategy, "exclusion": "mod", **more}


def config_of(**params) -> QuantConfig:
    return suggest(FixedTrial(params), SPACE, num_steps=20)


def test_each_strategy_is_the_config_it_names():
    dynamic = config_of(strategy="dynamic", exclusion="none")
    static = config_of(strategy="static", exclusion="none", act_method="mean_minmax")
    m4 = config_of(strategy="m4", exclusion="mod")

    assert (dynamic.linear, dynamic.smoothing) == (W8A8Dynamic(), None)
    assert (static.linear, static.smoothing) == (W8A8Static(act_method="mean_minmax"), None)
    assert (m4.linear, m4.smoothing) == (W8A8Dynamic(), M4())
    assert (m4.layers.include, m4.layers.exclude) == (("*single_blocks*",), ("*modulation*", "*linear2*"))
    assert dynamic.layers.exclude == ()


LOW_BITS = {
    "w8a16": W8A16(),
    "w4a16": W4A16(group_size=128),
    "w4a8": W4A8(),
    "w4a4_dynamic": W4A4Dynamic(),
    "m3+w4a16": W4A16(group_size=128),
}


@pytest.mark.parametrize("strategy", LOW_BITS)
def test_a_strategy_of_few_bits_is_the_config_it_names(strategy):
    space = SPACE.model_copy(update={"strategies": tuple(LOW_BITS)})
    study = optuna.create_study()
    study.enqueue_trial({"strategy": strategy, "exclusion": "none"})
    trial = study.ask()

    config = suggest(trial, space, num_steps=20)

    assert config.linear == LOW_BITS[strategy]
    assert strategy_of(config) == strategy
    assert trial.params == {"strategy": strategy, "exclusion": "none"}


def test_the_group_size_is_asked_for_where_there_is_a_choice():
    space = SPACE.model_copy(update={"strategies": ("w4a16", "w8a16"), "group_sizes": (0, 64)})
    choice = {"strategy": "w4a16", "exclusion": "none", "group_size": 64}

    assert suggest(FixedTrial(choice), space, num_steps=20).linear == W4A16(group_size=64)
    assert suggest(FixedTrial({"strategy": "w8a16", "exclusion": "none"}), space, num_steps=20).linear == W8A16()


def test_spaces_of_before_keep_their_digest():
    """A study may be resumed although spaces have got a field since."""
    stored = load_space("mini").model_dump(mode="json")

    assert "group_sizes" not in stored
    assert all("group_size" not in preset["params"] for preset in stored["presets"])


@pytest.mark.parametrize(("num_steps", "timestep_sep"), [(20, 5), (50, 12), (8, 2), (3, 1)])
def test_a_share_serves_any_number_of_steps(num_steps, timestep_sep):
    """12.5 steps of 50 round to the even 12, 0.75 steps of 3 to 1."""
    params = {"strategy": "timestep", "exclusion": "none", "act_method": "minmax", "timestep_sep_share": 0.25}

    config = suggest(FixedTrial(params), SPACE, num_steps=num_steps)

    assert config.linear == W8A8Timestep(act_method="minmax", timestep_sep=timestep_sep)


def test_timestep_without_a_static_step_is_the_dynamic_config_itself():
    """Else an evaluated config would be evaluated again under two other names."""
    all_dynamic = {
        config_of(strategy="timestep", exclusion="mod", act_method=act_method, timestep_sep_share=1.0)
        for act_method in SPACE.act_methods
    }

    assert all_dynamic == {config_of(strategy="dynamic", exclusion="mod")}


def test_timestep_without_a_dynamic_step_is_not_the_static_config():
    """One range per step is another quantization than one range for all steps."""
    timestep = config_of(strategy="timestep", exclusion="mod", act_method="minmax", timestep_sep_share=0.0)

    assert timestep.linear == W8A8Timestep(act_method="minmax", timestep_sep=0)
    assert timestep != config_of(strategy="static", exclusion="mod", act_method="minmax")


@pytest.mark.parametrize("name", WITH_NAMED_SETS)
def test_enqueued_presets_come_back_as_the_seeds_recipes(name):
    space = load_space(name)
    study = optuna.create_study()
    for preset in space.presets:
        study.enqueue_trial(preset_params(space, preset.name))

    configs = {}
    for preset in space.presets:
        trial = study.ask()
        configs[preset.name] = suggest(trial, space, num_steps=50)
        assert trial.params == preset_params(space, preset.name)
        study.tell(trial, 0.0)

    seed = ("*img_mod*", "*modulation*", "*fc2*")
    linear = {name: config.linear for name, config in configs.items()}
    assert linear["timestep"] == linear["m4_timestep"] == W8A8Timestep(act_method="minmax", timestep_sep=25)
    assert linear["static"] == W8A8Static(act_method="minmax")
    assert linear["dynamic"] == linear["m3"] == linear["m4"] == linear["m6"] == linear["fa3"] == W8A8Dynamic()
    smoothing = {name: config.smoothing.kind for name, config in configs.items() if config.smoothing is not None}
    assert {"m3": "m3", "m4": "m4", "m6": "m6", "m4_timestep": "m4"}.items() <= smoothing.items()
    assert configs["m6"].smoothing == M6()
    assert configs["fa3"].attention == FA3Int8()
    assert configs["fa3"].layers.exclude == ("*img_mod*", "*modulation*")
    assert all(configs[name].layers.exclude == seed for name in ("timestep", "dynamic", "m3", "m4", "m6", "static"))
    assert all(config.layers.include == ("*double_blocks*", "*single_blocks*") for config in configs.values())
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"\['timestep', 'dynamic', .*got 'timestp'; did you mean 'timestep'\?"):
        preset_params(load_space("mini"), "timestp")


FULL = SearchSpace.model_validate(
    {
        "name": "full",
        "strategies": ["timestep", "dynamic", "m3", "m6+static", "m4+timestep+fa3", "fp8"],
        "percentiles": ["none", 0.9999],
        "calibrations": ["single_pass", "sequential"],
        "placements": ["multiplier", "fold"],
        "attention_statistics": ["window", "absmax"],
        "exclusions": {"none": []},
    }
)


def test_combinations_are_the_configs_they_name():
    params = {"exclusion": "none", "act_method": "minmax", "percentile": 0.9999, "calibration": "sequential"}
    mixed = {**params, "strategy": "m4+timestep+fa3", "timestep_sep_share": 0.5, "placement": "fold"}
    mixed["attention_statistic"] = "absmax"

    config = suggest(FixedTrial(mixed), FULL, num_steps=20)
    fp8 = suggest(FixedTrial({"strategy": "fp8", "exclusion": "none"}), FULL, num_steps=20)

    assert config.linear == W8A8Timestep(act_method="minmax", timestep_sep=10, percentile=0.9999)
    assert config.smoothing == M4(placement="fold")
    assert config.attention == FA3Int8(statistic="absmax")
    assert config.calibration == "sequential"
    assert (fp8.linear, fp8.attention, fp8.smoothing) == (W8A8Dynamic(), FA3Fp8(), None)


def test_choices_are_asked_only_where_they_mean_something_and_there_are_several():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    asked = {}
    for _ in range(80):
        trial = study.ask()
        suggest(trial, FULL, num_steps=20)
        asked[trial.params["strategy"]] = set(trial.params) - {"strategy", "exclusion"}
        study.tell(trial, 0.0)

    ranges = {"act_method", "percentile", "calibration"}
    assert asked == {
        "timestep": ranges | {"timestep_sep_share"},
        "dynamic": set(),
        "m3": {"placement"},
        "m6+static": ranges | {"placement"},
        "m4+timestep+fa3": ranges | {"timestep_sep_share", "placement", "attention_statistic"},
        "fp8": set(),
    }
    assert "percentile" not in suggest_params(SPACE, "static")


def suggest_params(space: SearchSpace, strategy: str) -> set[str]:
    study = optuna.create_study()
    study.enqueue_trial({"strategy": strategy})
    trial = study.ask()
    suggest(trial, space, num_steps=20)
    return set(trial.params)


def test_a_timestep_strategy_whose_steps_are_all_dynamic_is_the_plain_dynamic_config():
    params = {"strategy": "timestep", "exclusion": "none", "act_method": "minmax", "timestep_sep_share": 0.9}
    more = {"percentile": 0.9999, "calibration": "sequential"}

    config = suggest(FixedTrial({**params, **more}), FULL, num_steps=4)

    assert config == suggest(FixedTrial({"strategy": "dynamic", "exclusion": "none"}), FULL, num_steps=4)
