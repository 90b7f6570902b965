from itertools import product

import pytest

from hyquant.config import M4, M6, LayerSelection, QuantConfig, W8A8Dynamic, W8A8Static
from hyquant.sensitivity.bands import LayerBand
from hyquant.sensitivity.ladder import Ladder
from hyquant.sensitivity.map import SensitivityMap, SensitivityRow, Subject
from search.cli import exit_code_of
from search.explain import FLOAT_LAYERS, differences, float_layers, neighbours, sensitivity_sentence
from search.overview import read_overview
from search.picks import Point, choose_picks
from search.result import MetricResult
from search.stability import pick_stability
from spaces.space import SearchSpace

LADDER = Ladder(source="x", layers=("double_blocks.0.img_mlp.fc1", "single_blocks.0.linear2"), rungs=())


def test_another_kind_is_one_choice_whatever_fields_it_has():
    static, dynamic = QuantConfig(linear=W8A8Static(act_method="mix")), QuantConfig(linear=W8A8Dynamic())

    assert differences(static, dynamic) == {"linear": ("w8a8_static", "w8a8_dynamic")}
    assert differences(static, QuantConfig(linear=W8A8Static())) == {"linear.act_method": ("mix", "minmax")}


def test_every_changed_choice_is_counted_and_order_of_patterns_is_none():
    one = QuantConfig(linear=W8A8Dynamic(), smoothing=M4(), layers=LayerSelection(exclude=("*a*", "*b*")))
    same = one.model_copy(update={"layers": LayerSelection(exclude=("*b*", "*a*"))})
    other = QuantConfig(linear=W8A8Dynamic(), smoothing=M6(), layers=LayerSelection(exclude=("*a*",)))

    assert differences(one, same) == {}
    assert set(differences(one, other)) == {"smoothing", FLOAT_LAYERS}


def test_a_layer_is_in_float_for_its_rung_or_its_switch(small_study):
    ladder = LADDER.model_copy(update={"rungs": (("double_blocks.0.img_mlp.fc1",),)})
    space = SearchSpace(
        name="s",
        strategies=("dynamic",),
        include=("*",),
        exclusions="ladder",
        switches={"tails": ("*linear2",)},
        ladder=ladder,
    )
    layers = LayerSelection(exclude=("double_blocks.*.img_mlp.fc1", "single_blocks.0.linear2"))
    found = float_layers(QuantConfig(linear=W8A8Dynamic(), layers=layers), space)

    assert [one.why for one in found] == ["rung 1 of the ladder", "switch tails"]
    (named,) = {
        one.why
        for one in float_layers(
            QuantConfig(
                linear=W8A8Dynamic(),
                layers=LayerSelection(exclude=small_study.space.exclusions["seed"]),  # type: ignore[index]
            ),
            small_study.space,
        )
    }
    assert named == "exclusion set seed"


def test_neighbours_differ_in_the_fewest_choices_and_say_what_they_gained(filled_study):
    overview = read_overview(filled_study)
    row = overview.row(1)
    found = neighbours(row, overview)

    assert found
    fewest = min(
        len(differences(row.config, other.config))
        for other in overview.rows
        if other.state in ("complete", "infeasible") and other.config != row.config
    )
    for neighbour in found:
        other = overview.row(neighbour.number)
        assert len(neighbour.choices) == fewest
        assert neighbour.gains["latency_ratio"] == pytest.approx(
            row.values["latency_ratio"] - other.values["latency_ratio"]
        )


def test_stability_equals_the_share_of_all_resamples_of_two_prompts(filled_study, make_result):
    """Two prompts have four resamples, which are enumerated; 4,000 draws come within 5 % of their shares."""
    study = filled_study
    for number, trial in enumerate(study.get_trials(deepcopy=False)):
        if "result" in trial.user_attrs:
            spread = 0.03 * (-1) ** number
            metric = trial.user_attrs["result"]["metrics"]["clip_reference"]
            metric["values"] = [metric["mean"] - spread, metric["mean"] + spread]
    overview = read_overview(study)
    names, directions = ("clip_reference", "latency_ratio"), ("maximize", "minimize")
    rows = [row for row in overview.rows if row.state == "complete"]
    expected: dict[int, float] = {}
    for chosen in product(range(2), repeat=2):
        points = [
            Point(
                r.number,
                (sum(r.result.metrics["clip_reference"].values[i] for i in chosen) / 2, r.values["latency_ratio"]),
            )
            for r in rows
        ]
        front = [
            p
            for p in points
            if not any(
                o.values != p.values and o.values[0] >= p.values[0] and o.values[1] <= p.values[1] for o in points
            )
        ]
        number = choose_picks(front, names, directions, (1.0, 1.0))["balanced"]
        expected[number] = expected.get(number, 0.0) + 0.25
    found = pick_stability(overview, num_draws=4000)["balanced"]

    assert isinstance(rows[0].result.metrics["clip_reference"], MetricResult)
    assert found == pytest.approx(expected, abs=0.05)


def test_the_command_explains_a_pick_and_refuses_what_was_not_measured(stored_store, capsys):
    assert exit_code_of(["explain", "demo", "3", "--store", str(stored_store)]) == 0
    assert "against the nearest evaluated trials" in capsys.readouterr().out
    assert exit_code_of(["explain", "demo", "13", "--store", str(stored_store)]) == 1
    assert "failed" in capsys.readouterr().err


def test_the_quantized_share_of_sensitivity_is_that_of_the_squares():
    """Bands of 0.3 and 0.4: with the first in float 0.16 of 0.25 is quantized."""
    errors = {"linear1": 0.3, "linear2": 0.4}
    block = "single_blocks.0"
    bands = tuple(LayerBand(block=block, kind=kind, layers=(f"{block}.{kind}",)) for kind in errors)
    rows = tuple(
        SensitivityRow(block=block, kind=kind, first_step=0, last_step=3, relative_l2=error)
        for kind, error in errors.items()
    )
    found = SensitivityMap.model_construct(subject=Subject.model_construct(bands=bands, num_steps=4), rows=rows)
    config = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(exclude=("*linear1",)))
    sentence = sensitivity_sentence(config, found)

    assert "64%" in sentence
    assert "single_blocks.0.linear2" in sentence
