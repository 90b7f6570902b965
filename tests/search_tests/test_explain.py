import dataclasses
from itertools import product

import pytest

from hyquant.config import M4, M6, LayerSelection, QuantConfig, W8A8Dynamic, W8A8Static
from hyquant.sensitivity.bands import LayerBand
from hyquant.sensitivity.ladder import Ladder
from hyquant.sensitivity.map import SensitivityMap, SensitivityRow, Subject
from search.cli import exit_code_of
from search.commands.explaining import _sentence
from search.confirmation import Confirmation, store_confirmation
from search.explain import FLOAT_LAYERS, differences, neighbours, sensitivity_sentence
from search.float_layers import BY_HAND, FloatLayers, LadderChoice, float_layers, in_words, ladder_choice
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


HALF = LayerSelection(include=("*double_blocks*",), exclude=("*fc2*",))


def test_layers_that_only_one_of_two_configs_includes_are_a_difference():
    one = QuantConfig(linear=W8A8Dynamic(), layers=HALF)
    other = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(exclude=("*fc2*",)))
    same = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(include=tuple(reversed(other.layers.include))))

    assert differences(one, other) == {
        FLOAT_LAYERS: ("all but *double_blocks*; also *fc2*", "all but *double_blocks*, *single_blocks*; also *fc2*")
    }
    assert differences(same, QuantConfig(linear=W8A8Dynamic())) == {}


def test_what_the_space_includes_and_a_config_does_not_is_in_float_by_hand(small_study):
    space = small_study.space
    assert isinstance(space.exclusions, dict)
    name, patterns = next(iter(space.exclusions.items()))
    narrow, full, wide = (
        QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(include=include, exclude=patterns))
        for include in (("*double_blocks*",), space.include, ("*",))
    )

    assert float_layers(narrow, space)[0] == FloatLayers("all but *double_blocks*", BY_HAND)
    assert in_words(narrow, space).startswith("all but *double_blocks*")
    assert [in_words(full, space), in_words(wide, space)] == [name, name]
    assert float_layers(wide, space) == float_layers(full, space)


def test_a_ladder_counts_layers_that_a_config_does_not_include():
    """A rung of all single blocks leaves the same layers in float as a config that includes double blocks alone."""
    rung = LADDER.model_copy(update={"rungs": (("single_blocks.0.linear2",),)})
    spaces = [
        SearchSpace(name="s", strategies=("dynamic",), include=("*",), exclusions="ladder", ladder=ladder)
        for ladder in (rung, LADDER)
    ]
    config = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(include=("*double_blocks*",)))

    assert [in_words(config, space) for space in spaces] == ["rung 1", "all but *double_blocks*"]
    for space in spaces:
        assert float_layers(config, space) == [FloatLayers("all but *double_blocks*", BY_HAND)]


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


def neighbour_before_and_after(study, **changes):
    """The first neighbour of trial 1, and what it is once its latency was found otherwise."""
    overview = read_overview(study)
    row, near = overview.row(1), neighbours(overview.row(1), overview)[0]
    other = overview.row(near.number)
    latency = other.result.latency.model_copy(update=changes)
    changed = dataclasses.replace(other, result=other.result.model_copy(update={"latency": latency}))
    rows = tuple(changed if one.number == other.number else one for one in overview.rows)
    found = neighbours(row, dataclasses.replace(overview, rows=rows))
    return near, next(one for one in found if one.number == other.number)


def test_latencies_of_two_kinds_are_not_subtracted_and_it_is_said(filled_study):
    near, found = neighbour_before_and_after(filled_study, kind="simulated")

    assert near.latency_kinds is None
    assert found.latency_kinds == ("native", "simulated")
    assert set(near.gains) - set(found.gains) == {"latency_ratio"}
    assert "its latency is simulated and not native" in _sentence(found)
    assert "latency_ratio" not in _sentence(found)


def test_latencies_of_two_devices_are_not_subtracted_and_the_devices_are_named(filled_study):
    near, found = neighbour_before_and_after(filled_study, device="cuda", hardware="a fast one")

    assert near.timed_on is None
    assert found.timed_on == ("cpu", "cuda (a fast one)")
    assert set(near.gains) - set(found.gains) == {"latency_ratio"}
    assert _sentence(found).endswith(
        "; it was timed on cuda (a fast one) and not on cpu, so latencies are not compared"
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


def test_stability_speaks_of_the_second_values_once_there_are_some(filled_study, make_result):
    """Two members are measured again, and the first of them is better for every prompt: no resample picks the other."""
    better, worse = read_overview(filled_study).front[:2]
    for row, similarity, latency in ((better, 0.95, 0.5), (worse, 0.90, 0.6)):
        again = make_result(quality=similarity, ratio=latency, values=(similarity, latency))
        metric = again.metrics["clip_reference"]
        metrics = {**again.metrics, "clip_reference": metric.model_copy(update={"values": (similarity,) * 2})}
        again = again.model_copy(update={"metrics": metrics})
        store_confirmation(filled_study, row.number, Confirmation(result=again, float_scores={}))

    found = pick_stability(read_overview(filled_study))

    assert found == {name: {better.number: 1.0} for name in ("safe", "balanced", "fast")}


def test_a_prompt_is_drawn_with_all_of_its_seeds(filled_study, make_result):
    """Two prompts of five seeds: one member is better for the first prompt, the other for the second by less. So one is
    `safe` in three of four resamples of prompts; of ten videos drawn one by one it would be in 62 %, with five or more
    of the first prompt.
    """
    first, second = read_overview(filled_study).front[:2]
    for row, videos, ratio in ((first, (0.95, 0.85), 0.5), (second, (0.90, 0.89), 0.4)):
        again = make_result(quality=sum(videos) / 2, ratio=ratio, values=(sum(videos) / 2, ratio))
        metric = again.metrics["clip_reference"].model_copy(update={"values": videos * 5})
        again = again.model_copy(update={"metrics": {"clip_reference": metric}})
        store_confirmation(filled_study, row.number, Confirmation(result=again, float_scores={}))

    found = pick_stability(read_overview(filled_study), num_draws=4000)["safe"]

    assert found[first.number] == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(("rung", "switches"), [(0, ()), (1, ()), (2, ()), (0, ("heads",)), (1, ("heads", "tails"))])
def test_what_was_chosen_of_a_ladder_is_found_again_in_the_config(rung, switches):
    layers = tuple(f"single_blocks.{block}.{kind}" for block in range(3) for kind in ("linear1", "linear2"))
    ladder = Ladder(source="x", layers=layers, rungs=(layers[:1], layers[1:3]))
    patterns = {"heads": ("*.0.*",), "tails": ("*.2.linear2",)}
    space = SearchSpace(
        name="s", strategies=("dynamic",), include=("*",), exclusions="ladder", switches=patterns, ladder=ladder
    )
    exclude = (*ladder.excluded(rung), *(pattern for name in switches for pattern in patterns[name]))
    config = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(exclude=exclude))

    # Rung 1 is within "heads", so that the lowest rung that does is 0.
    lowest = 0 if "heads" in switches else rung
    assert ladder_choice(config, space) == LadderChoice(lowest, switches)
    assert in_words(config, space) == " + ".join((f"rung {lowest}", *switches))
    by_hand = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(exclude=("*.1.linear2",)))
    assert ladder_choice(by_hand, space) is None
    assert in_words(by_hand, space) == "*.1.linear2"


def test_the_command_explains_a_pick_and_refuses_what_was_not_measured(stored_store, capsys):
    assert exit_code_of(["explain", "demo", "3", "--store", str(stored_store)]) == 0
    assert "against the nearest evaluated trials" in capsys.readouterr().out
    assert exit_code_of(["explain", "demo", "balanced", "--store", str(stored_store)]) == 0
    assert "balanced in" in capsys.readouterr().out
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

    assert "holds 64% of" in sentence
    assert "single_blocks.0.linear2 alone 64%" in sentence
    assert "single_blocks.0.linear2" in sentence

    narrow = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(include=("*linear2",)))
    assert sensitivity_sentence(narrow, found) == sentence
