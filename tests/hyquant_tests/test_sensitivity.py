"""Probing a denoiser: against errors worked out by hand, and with kept blocks against whole forwards."""

import math
import os
import signal
import subprocess
import sys
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hyquant.calibration.capture import capture_in_memory
from hyquant.clock import StepClock
from hyquant.config import LayerSelection, W8A8Dynamic, digest
from hyquant.errors import CalibrationError, ConfigError
from hyquant.layers import select_layers
from hyquant.models.base import Record, RenderSettings
from hyquant.models.names import layer_groups
from hyquant.models.skeleton import published_skeleton
from hyquant.models.tiny import TinyVideoModel
from hyquant.modules.swap import swapped
from hyquant.sensitivity.bands import bands_of, patterns_of
from hyquant.sensitivity.cost import ProbeCost, probe_cost
from hyquant.sensitivity.files import Journal, load_map, save_map
from hyquant.sensitivity.ladder import Ladder, ladder, rung_sizes
from hyquant.sensitivity.map import (
    Measurement,
    SensitivityMap,
    StepRange,
    Subject,
    by_band,
    rows_of,
    step_ranges,
)
from hyquant.sensitivity.probe import Prober
from tests.toys.chain import WEIGHT_SCALE, ToyChain, toy_records
from tests.toys.original_dit import ToySize, random_toy, toy_inputs

ROOT = Path(__file__).resolve().parents[2]
ONE_STEP = (StepRange(first=0, last=0, probed=(0,)),)
GAINS = [(1.0, 8.0), (0.0, 2.0), (16.0, 4.0)]
NAMES = [f"double_blocks.{i}.{kind}" for i in range(20) for kind in ("img_mod.linear", "txt_mlp.fc1")] + [
    f"single_blocks.{i}.linear1" for i in range(40)
]


def prober(denoiser, *, width: int = 1, num_steps: int = 2, keep_blocks: bool = True) -> Prober:
    groups = layer_groups(denoiser)
    names = [group.name for group in groups]
    bands = bands_of([name for name in names if "blocks." in name or name == "final_layer.linear"], width=width)
    clock = StepClock(num_steps)
    return Prober(denoiser, groups, bands, clock, scheme=W8A8Dynamic(), num_steps=num_steps, keep_blocks=keep_blocks)


def subject_of(bands, ranges=ONE_STEP, **changes) -> Subject:
    about = {"model": "m", "dtype": "float32", "device": "cpu", "prompts": "p", "num_prompts": 1, "num_steps": 1}
    return Subject(scheme=W8A8Dynamic(), bands=bands, ranges=ranges, **(about | changes))


def map_of(bands, values) -> SensitivityMap:
    """A map of one step in which each band has a given sensitivity; None is an output that is not finite."""
    subject = subject_of(bands)
    measured = [
        Measurement(
            prompt_index=0,
            step_index=0,
            block=band.block,
            kind=band.kind,
            error=None if value is None else value**2,
            reference=1.0,
        )
        for band, value in zip(bands, values, strict=True)
    ]
    rows = rows_of(subject, measured)
    return SensitivityMap(subject=subject, rows=rows, keeps_blocks=True, cost=ProbeCost(whole=1, kept=1), seconds=0.0)


def test_each_linear_changes_the_output_by_what_the_construction_says():
    denoiser, records = ToyChain(GAINS), toy_records(2)
    found = {one.key: one for one in prober(denoiser).measure(records)}

    assert len(found) == 2 * 6
    for record in records:
        x = record.inputs["x"].double().numpy()
        moved = np.abs(WEIGHT_SCALE / 4 * x[:, 1:].sum(1, keepdims=True)) * np.ones((1, 8))
        output = sum(
            gain * x @ layer.weight.double().numpy().T
            for block, gains in zip(denoiser.blocks, GAINS, strict=True)
            for layer, gain in zip((block.a, block.b), gains, strict=True)
        )
        for index, gains in enumerate(GAINS):
            for kind, gain in zip("ab", gains, strict=True):
                one = found[0, record.step_index, f"blocks.{index}", kind]
                assert one.error == pytest.approx((gain**2) * (moved**2).sum(), rel=1e-4)  # sums in float32
                assert one.reference == pytest.approx((output**2).sum(), rel=1e-5)
    assert found[0, 0, "blocks.1", "a"].error == 0


def test_the_ladder_of_the_toy_begins_with_the_largest_gains():
    denoiser = ToyChain(GAINS)
    bands = bands_of([group.name for group in layer_groups(denoiser)])
    subject = subject_of(bands, step_ranges(2, 1), num_steps=2)
    rows = rows_of(subject, prober(denoiser).measure(toy_records(2)[1:]))
    found = SensitivityMap(subject=subject, rows=rows, keeps_blocks=True, cost=ProbeCost(whole=1, kept=1), seconds=0.0)

    steps = ladder(found)

    assert [steps.excluded(rung) for rung in range(steps.height + 1)] == [
        (),
        ("blocks.2.a",),
        ("blocks.2.a", "blocks.0.b"),
        ("blocks.2.a", "blocks.0.b", "blocks.2.b"),
        ("blocks.2.a", "blocks.0.b", "blocks.2.b", "blocks.1.b"),
    ]
    assert steps.patterns(2) == ("blocks.2.a", "blocks.0.b")


def diffusers_toy():
    model = TinyVideoModel()
    settings = RenderSettings(height=16, width=16, num_frames=1, num_steps=1)
    return model.denoiser, capture_in_memory(model, ["a red square"], [0], settings)


def original_toy():
    size = ToySize(num_refiner_layers=1)
    return random_toy(0, size), [Record(0, 0, toy_inputs(size, seed=0))]


@pytest.mark.parametrize("toy", [diffusers_toy, original_toy])
def test_kept_blocks_give_the_same_numbers_bit_by_bit(toy):
    denoiser, records = toy()
    kept, whole = prober(denoiser), prober(denoiser, keep_blocks=False)

    with_kept = sorted(kept.measure(records), key=lambda one: one.key)
    without = sorted(whole.measure(records), key=lambda one: one.key)

    assert (kept.keeps_blocks, whole.keeps_blocks) == (True, False)
    assert with_kept == without
    assert all(one.error is not None and one.error > 0 for one in without)
    assert len({one.error for one in without}) > len(without) / 2


def test_bands_of_several_blocks_with_kept_blocks_are_bit_equal_too():
    denoiser, records = diffusers_toy()

    kept = list(prober(denoiser, width=2).measure(records))
    whole = list(prober(denoiser, width=2, keep_blocks=False).measure(records))

    assert sorted(kept, key=lambda one: one.key) == sorted(whole, key=lambda one: one.key)
    assert {one.block for one in kept} >= {"double_blocks.0-1", "single_blocks.0-1", "outside"}


@pytest.mark.parametrize("width", [1, 2, 3])
def test_as_many_blocks_run_as_the_cost_says(width):
    kept, whole = ToyChain(GAINS * 2), ToyChain(GAINS * 2)
    for denoiser, keep_blocks in ((kept, True), (whole, False)):
        list(prober(denoiser, width=width, num_steps=3, keep_blocks=keep_blocks).measure(toy_records(3)))
    bands = bands_of([group.name for group in layer_groups(kept)], width=width)

    cost = probe_cost([f"blocks.{index}" for index in range(6)], bands, num_records=3)

    assert whole.num_block_calls == round(6 * cost.whole)
    assert kept.num_block_calls == round(6 * cost.kept)
    assert kept.num_block_calls < whole.num_block_calls


@pytest.mark.parametrize("skips_to", [2, 3, 4])
def test_a_denoiser_that_hands_sums_past_its_blocks_runs_whole(skips_to):
    """From block 0 of 4 to the last one, to the end, or to block 2, which the last block alone does not show."""
    denoiser = ToyChain([*GAINS, (1.0, 2.0)], skips_to=skips_to)
    own, whole = prober(denoiser), prober(denoiser, keep_blocks=False)

    assert list(own.measure(toy_records(1))) == list(whole.measure(toy_records(1)))
    assert own.keeps_blocks is False


def test_what_is_handed_past_blocks_between_which_nothing_is_cut_does_no_harm():
    denoiser = ToyChain([*GAINS, (1.0, 2.0)], skips_to=1)
    own, whole = prober(denoiser, width=2), prober(denoiser, width=2, keep_blocks=False)

    assert list(own.measure(toy_records(1))) == list(whole.measure(toy_records(1)))
    assert own.keeps_blocks is True


def test_the_denoiser_is_in_float_between_probes_and_after_an_error():
    denoiser = ToyChain(GAINS)
    blocks = list(denoiser.blocks)
    broken = Record(1, 0, {"x": torch.full((5, 8), math.inf)})

    measuring = prober(denoiser).measure([*toy_records(1), broken])
    states = [swapped(denoiser) for _, _ in zip(range(6), measuring, strict=False)]
    with pytest.raises(CalibrationError, match="float output must be finite, but it is not at step 1"):
        next(measuring)

    assert states == [None] * 6
    assert list(denoiser.blocks) == blocks
    assert swapped(denoiser) is None


def test_known_measurements_are_not_made_again():
    denoiser, records = ToyChain(GAINS), toy_records(2, num_prompts=2)
    everything = list(prober(denoiser).measure(records))
    known = {one.key for one in everything[:15]}

    rest = list(prober(denoiser).measure(records, known=known))

    assert rest == everything[15:]
    calls = denoiser.num_block_calls
    done = prober(denoiser, keep_blocks=False)
    assert list(done.measure(records, known={one.key for one in everything})) == []
    assert denoiser.num_block_calls == calls


def test_whether_blocks_can_be_kept_is_told_even_if_nothing_is_left_to_measure():
    records = toy_records(1)
    for skips_to in (None, len(GAINS)):
        denoiser = ToyChain(GAINS, skips_to=skips_to)
        known = {one.key for one in prober(denoiser).measure(records)}
        resumed = prober(denoiser)

        assert list(resumed.measure(records, known=known)) == []
        assert resumed.keeps_blocks is (skips_to is None)


def test_hunyuan_video_takes_a_third_less_with_kept_blocks_and_little_with_bands_of_five():
    """20 double blocks of 10 Linears and 40 single ones of 3, of equal cost; sums of 1 .. n by hand."""
    names = [group.name for group in layer_groups(published_skeleton())]
    names = list(select_layers(names, LayerSelection(), model="HunyuanVideo"))
    blocks = [f"double_blocks.{i}" for i in range(20)] + [f"single_blocks.{i}" for i in range(40)]

    by_block = probe_cost(blocks, bands_of(names), num_records=1)
    by_five = probe_cost(blocks, bands_of(names, width=5), num_records=1)

    behind = (10 * (60 * 61 - 40 * 41) / 2 + 3 * 40 * 41 / 2) / 60
    assert by_block.whole == 321
    checked = (59 + 59 * 60 / 2) / 60
    assert by_block.kept == pytest.approx(1 + 59 / 60 + behind + checked)
    assert by_five.whole == 1 + 4 * 10 + 8 * 3
    assert by_five.kept == pytest.approx(
        1 + 55 / 60 + (10 * (60 + 55 + 50 + 45) + 3 * 5 * 36) / 60 + (55 + 5 * 66) / 60
    )


def test_a_denoiser_without_blocks_takes_whole_forwards():
    bands = bands_of(["proj_in", "proj_out"])

    assert probe_cost([], bands, num_records=3) == ProbeCost(whole=3 * (1 + len(bands)), kept=3 * (1 + len(bands)))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4))
def test_step_ranges_cover_every_step_once_and_probe_within(num_steps, num_ranges, probes):
    if num_ranges > num_steps:
        with pytest.raises(ConfigError, match="ask for fewer ranges"):
            step_ranges(num_steps, num_ranges)
        return
    ranges = step_ranges(num_steps, num_ranges, probes=probes)

    assert [step for part in ranges for step in range(part.first, part.last + 1)] == list(range(num_steps))
    assert all(part.first <= step <= part.last for part in ranges for step in part.probed)
    assert all(1 <= len(part.probed) <= probes for part in ranges)


def test_rows_pool_errors_and_references_and_bands_weigh_ranges_by_their_steps():
    bands = bands_of(["b.0.k"])
    ranges = (StepRange(first=0, last=0, probed=(0,)), StepRange(first=1, last=3, probed=(2,)))
    subject = subject_of(bands, ranges, num_steps=4, num_prompts=2)
    numbers = {(0, 0): (1.0, 40.0), (1, 0): (8.0, 60.0), (0, 2): (4.0, 100.0), (1, 2): (0.0, 300.0)}
    measured = [
        Measurement(prompt_index=p, step_index=s, block="b.0", kind="k", error=error, reference=reference)
        for (p, s), (error, reference) in numbers.items()
    ]
    rows = rows_of(subject, measured)
    found = SensitivityMap(subject=subject, rows=rows, keeps_blocks=True, cost=ProbeCost(whole=1, kept=1), seconds=0.0)

    assert [row.relative_l2 for row in rows] == [pytest.approx(0.3), pytest.approx(0.1)]
    assert by_band(found)["b.0", "k"] == pytest.approx(math.sqrt((0.09 + 3 * 0.01) / 4))


@given(st.lists(st.one_of(st.none(), st.just(0.0), st.floats(1e-6, 10)), min_size=3, max_size=80), st.integers(1, 4))
def test_rungs_are_nested_and_no_excluded_band_is_less_sensitive_than_one_that_is_not(values, width):
    bands = bands_of(NAMES, width=width)
    values = (values * 100)[: len(bands)]
    found = map_of(bands, values)

    steps = ladder(found)

    sets = [set(steps.excluded(rung)) for rung in range(steps.height + 1)]
    assert sets[0] == set()
    assert all(lower < higher for lower, higher in pairwise(sets))
    assert len(sets[-1]) < len(NAMES)
    sensitivity = {
        name: math.inf if value is None else value
        for band, value in zip(bands, values, strict=True)
        for name in band.layers
    }
    for excluded in sets[1:]:
        left = max(sensitivity[name] for name in NAMES if name not in excluded)
        assert min(sensitivity[name] for name in excluded) >= left * (1 - 1e-9)


def test_a_single_band_has_a_ladder_without_rungs():
    bands = bands_of(["b.0.k"])

    assert ladder(map_of(bands, [0.5])) == Ladder(source=digest(subject_of(bands)), layers=("b.0.k",), rungs=())


def test_rungs_grow_by_the_square_root_of_two_and_leave_a_tenth():
    assert list(rung_sizes(22)) == [1, 2, 3, 4, 6, 8, 11, 16]
    assert list(rung_sizes(320)) == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256]
    assert list(rung_sizes(1)) == []


@given(st.sets(st.sampled_from([*NAMES, "final_layer.linear"])))
def test_patterns_match_the_layers_and_no_others(layers):
    known = [*NAMES, "final_layer.linear"]

    patterns = patterns_of(layers, known)

    assert {name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)} == layers
    assert patterns == patterns_of(sorted(layers, reverse=True), known)


def test_patterns_are_short():
    assert patterns_of([name for name in NAMES if "img_mod" in name], NAMES) == ("double_blocks.*.img_mod.linear",)
    assert patterns_of([f"single_blocks.{i}.linear1" for i in (3, 4, 12, 13, 19)], NAMES) == (
        "single_blocks.[34].linear1",
        "single_blocks.1[239].linear1",
    )


@pytest.mark.parametrize(
    "rungs", [[["a.0.k"], ["a.0.k"]], [["b.0.k"]], [[]]], ids=["repeated layer", "unknown layer", "empty rung"]
)
def test_a_ladder_that_is_none_is_refused(rungs):
    with pytest.raises(ValidationError, match="measure the map again"):
        Ladder.model_validate({"source": "x", "layers": ["a.0.k", "a.1.k"], "rungs": rungs})


def test_a_band_spans_at_least_one_block():
    with pytest.raises(ConfigError, match="at least 1 block, but got 0"):
        bands_of(NAMES, width=0)


def test_a_map_on_disk_is_the_map(tmp_path):
    found = map_of(bands_of(NAMES[:4]), [0.5, None, 1e-12, 0.0])
    save_map(tmp_path / "new" / "map.json", found)

    assert load_map(tmp_path / "new" / "map.json") == found
    assert load_map(tmp_path / "none.json") is None


KILLED = """
import sys
from pathlib import Path
from hyquant.clock import StepClock
from hyquant.config import W8A8Dynamic
from hyquant.models.names import layer_groups
from hyquant.sensitivity.bands import bands_of
from hyquant.sensitivity.files import Journal
from hyquant.sensitivity.probe import Prober
from tests.toys.chain import ToyChain, toy_records

denoiser = ToyChain([(1.0, 8.0), (0.0, 2.0), (16.0, 4.0)])
groups = layer_groups(denoiser)
bands = bands_of([group.name for group in groups])
journal = Journal(Path(sys.argv[1]))
prober = Prober(denoiser, groups, bands, StepClock(2), scheme=W8A8Dynamic(), num_steps=2)
for measurement in prober.measure(toy_records(2)):
    journal.add(measurement)
    print(flush=True)
    sys.stdin.readline()
"""


@pytest.mark.multiproc
def test_measurements_survive_kill_9_and_a_line_cut_short(tmp_path):
    path = tmp_path / "journal.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        for _ in range(4):
            process.stdout.readline()
            process.stdin.write(b"\n")
            process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    everything = list(prober(ToyChain(GAINS)).measure(toy_records(2)))
    with path.open("ab") as file:
        file.write(everything[5].model_dump_json().encode()[:-9])

    journal = Journal(path)
    kept = list(journal.measured)
    for one in prober(ToyChain(GAINS)).measure(toy_records(2), known={one.key for one in kept}):
        journal.add(one)

    assert kept == everything[:5]
    assert journal.measured == Journal(path).measured == everything
