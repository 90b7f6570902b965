import math
from typing import Annotated, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from hyquant.config import QuantConfig
from hyquant.errors import ConfigError
from hyquant.models import require_frames
from hyquant.models.base import GuidedSettings
from search.parts import require_parts
from search.prompts import load_prompts
from search.study import Constraint, StudyConfig
from search.study_file import load_study

FILE = {
    "name": "s",
    "model": {"kind": "tiny", "source": "0"},
    "space": "mini",
    "workload": {
        "calibration_prompts": "calibration.txt",
        "search_prompts": "search.txt",
        "num_calibration_prompts": 2,
        "num_search_prompts": 2,
        "settings": {"height": 16, "width": 16, "num_frames": 5, "num_steps": 2},
    },
    "deployment": {"height": 32, "width": 32, "num_frames": 5, "num_steps": 2},
    "judge": {"model": "hashing"},
}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**FILE, **changes}))
        return path

    return write


def test_a_study_file_becomes_a_study_with_the_named_space(write):
    config = load_study(write())

    assert config.space.name == "mini"
    assert [objective.metric for objective in config.objectives] == ["clip_reference_excess", "latency_ratio"]


def test_all_problems_of_a_file_are_reported_at_once_with_the_closest_field(write):
    path = write(
        nmae="x", workload={**FILE["workload"], "sed": 3}, budget={"trials": 0}, space="mni", slots=[{"rnks": 2}]
    )

    with pytest.raises(ConfigError) as caught:
        load_study(path)

    message = str(caught.value)
    assert "breaks 5 rules" in message
    for part in (
        "did you mean 'name'?",
        "workload.sed: unknown field",
        "'seed'",
        "budget.trials: input should be greater than or equal to 1, but got 0",
        "'mini'",
        "'ranks'",
    ):
        assert part in message


def test_an_objective_that_no_metric_computes_is_refused_with_the_closest_name(write):
    path = write(objectives=[{"metric": "latency_rato", "direction": "minimize"}])

    with pytest.raises(ConfigError, match=r"objectives: .*did you mean 'latency_ratio'\?"):
        load_study(path)


def test_a_constraint_on_a_metric_that_is_not_listed_says_where_to_add_it(write):
    path = write(metrics=["clip_reference"], constraints=[{"metric": "clip_prompt_drop", "max": 0.1}])

    with pytest.raises(ConfigError, match="'clip_prompt_drop' needs 'clip_prompt' in metrics"):
        load_study(path)


@pytest.mark.parametrize("text", ["a: [", "- 1", ""], ids=["not YAML", "a list", "empty"])
def test_a_file_that_is_no_mapping_is_one_clear_sentence(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=r"study\.yaml must be"):
        load_study(path)


def test_a_missing_file_is_one_clear_sentence(tmp_path):
    with pytest.raises(ConfigError, match="must exist"):
        load_study(tmp_path / "no.yaml")


def test_identity_leaves_out_what_may_change_between_runs(write):
    first = load_study(write())
    second = load_study(write(budget={"trials": 99}, slots=[{"ranks": 2}], store="elsewhere"))

    assert first.identity() == second.identity()
    assert first.identity() != load_study(write(target="mindie-sd-3.1/910b")).identity()


@pytest.mark.parametrize(
    ("bound", "value", "violation"),
    [
        (Constraint(metric="m", min=0.5, max=2.0), 0.25, 0.25),
        (Constraint(metric="m", min=0.5, max=2.0), 3.0, 1.0),
        (Constraint(metric="m", min=0.5, max=2.0), 1.0, -0.5),
        (Constraint(metric="m", max=0.0), 0.0, 0.0),
    ],
)
def test_a_violation_is_the_distance_outside_the_bounds(bound, value, violation):
    assert bound.violation(value) == violation


def test_bounds_that_no_value_keeps_are_refused(write):
    path = write(constraints=[{"metric": "motion_energy_ratio", "min": 2, "max": 0.5}])

    with pytest.raises(ConfigError, match=r"motion_energy_ratio must have min <= max, but got 2 and 0\.5; swap them"):
        load_study(path)


def test_a_seed_that_generators_refuse_is_refused_in_the_file(write):
    path = write(workload={**FILE["workload"], "seed": 2**32})

    with pytest.raises(ConfigError, match=r"workload\.seed: input should be less than 4294967296, but got 4294967296"):
        load_study(path)


@pytest.mark.parametrize("where", ["workload.settings", "deployment", "certificate.settings"])
def test_a_clip_that_the_model_cannot_render_is_refused_before_the_study_is_stored(write, where):
    clip = {**FILE["deployment"], "num_frames": 6}
    sections = {
        "workload.settings": {"workload": {**FILE["workload"], "settings": clip}},
        "deployment": {"deployment": clip},
        "certificate.settings": {"certificate": {"prompts": "mini:heldout", "settings": clip}},
    }
    config = load_study(write(**sections[where]))

    with pytest.raises(ConfigError, match=rf"^{where}: num_frames must be 1 \+ a multiple of 4, but got 6; give 5"):
        require_parts(config)
    require_frames("a kind of another package", 6)


def numbers_of(model, where=""):
    """Yield every field of a model, and of the models in it, whose type is a float with its rules: name and type."""
    for name, field in model.model_fields.items():
        waiting = [Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation]
        while waiting:
            kind = waiting.pop()
            inner = get_args(kind)
            if kind is float or (get_origin(kind) is Annotated and inner[0] is float):
                yield f"{where}{name}", kind
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from numbers_of(kind, f"{where}{name}.")
            else:
                waiting += [one for one in inner if get_origin(one) is not Literal and not isinstance(one, FieldInfo)]


def takes(kind, value):
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("model", [StudyConfig, QuantConfig, GuidedSettings], ids=lambda model: model.__name__)
def test_no_number_that_users_write_may_be_endless_or_none(model):
    """They become JSON with a digest, which has no such numbers."""
    numbers = dict(numbers_of(model))
    taken = [(name, value) for name, kind in numbers.items() for value in (math.inf, math.nan) if takes(kind, value)]

    assert len(numbers) >= {"StudyConfig": 20, "QuantConfig": 5, "GuidedSettings": 2}[model.__name__]
    assert taken == []


def test_an_endless_number_in_a_file_is_one_clear_sentence(write):
    with pytest.raises(ConfigError, match=r"budget\.time_s: input should be a finite number, but got inf"):
        load_study(write(budget={"time_s": math.inf}))


def test_prompts_are_read_relative_to_the_study_file_and_must_be_disjoint(write, tmp_path):
    config = load_study(write())
    (tmp_path / "calibration.txt").write_text("a cat\n\n a dog \n")
    (tmp_path / "search.txt").write_text("a fox\na hen\na cow\n")

    prompts = load_prompts(config.workload, tmp_path)

    assert prompts.calibration == ("a cat", "a dog")
    assert prompts.search == ("a fox", "a hen")
    (tmp_path / "search.txt").write_text("a fox\na dog\n")
    with pytest.raises(ConfigError, match="must be disjoint, but share 1, the first 'a dog'"):
        load_prompts(config.workload, tmp_path)


def test_too_few_prompts_are_refused_with_both_numbers(write, tmp_path):
    config = load_study(write())
    (tmp_path / "calibration.txt").write_text("a cat\n")

    with pytest.raises(ConfigError, match=r"2 prompts are asked of calibration\.txt, but it holds 1"):
        load_prompts(config.workload, tmp_path)


def test_the_shipped_prompt_sets_are_known_by_name(write, tmp_path):
    config = load_study(write(workload={**FILE["workload"], "calibration_prompts": "mini:calibraton"}))

    with pytest.raises(ConfigError, match="did you mean 'calibration'"):
        load_prompts(config.workload, tmp_path)


def test_a_layout_means_slots(write):
    assert [(slot.ranks, slot.devices) for slot in load_study(write(slots="2 x 4")).slots] == [(4, "auto")] * 2
    with pytest.raises(ConfigError, match='slots: slots must be a list, or SLOTS x RANKS such as "2 x 4"'):
        load_study(write(slots="two"))
