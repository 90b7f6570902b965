import itertools

import pytest

from hyquant.config import FA3Int8, QuantConfig, W8A8Dynamic
from spaces.strategy import ATTENTIONS, SCHEMES, SMOOTHINGS, StrategyParts, parts_of, spelled, strategy_of


def test_every_combination_has_one_name_that_means_it():
    combinations = [
        StrategyParts(*parts) for parts in itertools.product((None, *SMOOTHINGS), SCHEMES, (None, *ATTENTIONS))
    ]
    names = [spelled(parts) for parts in combinations]

    assert len(set(names)) == len(combinations) == 84
    assert [parts_of(name) for name in names] == combinations


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timestep+m4", "'m4+timestep'"),
        ("m4+dynamic", "'m4'"),
        ("dynamic+fa3", "'fa3'"),
        ("m4+m4", "'m4'"),
        ("m3+m4", "'m3'"),
        ("static+timestep", "'timestep'"),
        ("m5", "'m5'"),
        ("", "''"),
        ("m4 + fa3", "'m4 '"),
    ],
)
def test_any_other_spelling_is_refused_with_the_right_one(name, hint):
    with pytest.raises(ValueError, match="strateg") as caught:
        parts_of(name)

    assert hint in str(caught.value)


def test_configs_outside_the_search_have_names_too():
    assert strategy_of(QuantConfig(linear=None)) == "float"
    assert strategy_of(QuantConfig(linear=None, attention=FA3Int8())) == "fa3_only"
    assert strategy_of(QuantConfig(linear=W8A8Dynamic(), attention=FA3Int8())) == "fa3"
