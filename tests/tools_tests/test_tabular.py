import random
import warnings
from dataclasses import replace

import pytest
from optuna.trial import FixedTrial

from hyquant.config import LayerSelection, QuantConfig, W8A8Dynamic, digest
from spaces.points import points
from spaces.suggest import preset_params, suggest
from tools.bench.tabular.domain import NUM_STEPS, base_space
from tools.bench.tabular.replay import replay, ways
from tools.bench.tabular.table import About, Row, Table, append_line, read_table
from tools.bench.tabular.volume import area, areas_over_time


def test_area_is_what_random_points_hit():
    draw = random.Random(0)
    losses = [(draw.random(), draw.random()) for _ in range(12)]
    shots = [(draw.random(), draw.random()) for _ in range(40_000)]
    hit = sum(any(quality <= x and latency <= y for quality, latency in losses) for x, y in shots) / len(shots)

    assert area(losses, (1.0, 1.0)) == pytest.approx(hit, abs=0.01)


def test_area_ignores_what_is_dominated_repeated_or_beyond_the_worst():
    assert area([(0.5, 0.5), (0.5, 0.5), (0.6, 0.7), (2.0, 0.1), (0.1, 1.5)], (1.0, 1.0)) == pytest.approx(0.25)
    assert area([], (1.0, 1.0)) == 0.0


def test_a_table_reads_back_and_forgets_a_line_cut_short(tmp_path):
    path = tmp_path / "table.jsonl"
    config = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(exclude=("*fc2*",)))
    about = About(layers=("a",), order=("b",), prompts=("c",), environment={}, latency="d")
    row = Row(
        digest=digest(config),
        config=config,
        scores={"ssim": (0.1,)},
        ratio=0.5,
        step_s={"control": 1.0},
        render_s=1.0,
        trial_s=2.0,
    )
    append_line(path, about)
    append_line(path, row)
    with path.open("a") as file:
        file.write('{"digest": "cut')
    append_line(path, row)

    assert read_table(path).rows == (row, row)
    assert read_table(path).about == about


LAYERS = (
    "double_blocks.0.img_attn_qkv",
    "double_blocks.0.img_mlp.fc1",
    *(f"single_blocks.{block}.{kind}" for block in (0, 1) for kind in ("linear1", "linear2")),
)
ORDER = ("single_0", "linear1", "double", "linear2")


@pytest.fixture(scope="module")
def table():
    """A table of made-up numbers over the complete space."""
    draw = random.Random(0)
    found = {digest(config): config for _, config in points(base_space(LAYERS), num_steps=NUM_STEPS)}
    scores = dict.fromkeys(("collapsed",), (0.0,) * 8) | {"motion_energy_ratio": (1.0,) * 8}
    rows = tuple(
        Row(
            digest=key,
            config=config,
            scores=scores | {"clip_reference": (1 - draw.random() / 10,) * 8},
            ratio=draw.uniform(0.6, 1.0),
            step_s={},
            render_s=1.0,
            trial_s=1.0,
        )
        for key, config in found.items()
    )
    return Table(about=About(layers=LAYERS, order=ORDER, prompts=("a", "b"), environment={}, latency=""), rows=rows)


def way(table, kind, encoding, *, has_presets):
    return next(w for w in ways(table) if (w.kind, w.encoding, w.has_presets) == (kind, encoding, has_presets))


def test_a_repeated_point_is_free_for_us_and_paid_for_by_the_baseline(table):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = replay(way(table, "random", "ladder", has_presets=True), table, seed=0, num_trials=60)
        theirs = replay(way(table, None, "bits", has_presets=False), table, seed=0, num_trials=60)

    assert ours.num_free > 0
    assert len({row.digest for row in ours.rows}) == len(ours.rows) == 60
    assert (theirs.num_free, len(theirs.rows)) == (0, 60)
    assert len({row.digest for row in theirs.rows}) < 60


def test_presets_come_first_and_the_ladder_is_part_of_the_space(table):
    searched = way(table, "grid", "ladder", has_presets=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = replay(searched, table, seed=0, num_trials=200)
    presets = [
        digest(suggest(FixedTrial(preset_params(searched.space, preset.name)), searched.space, num_steps=NUM_STEPS))
        for preset in searched.space.presets
    ]

    assert [row.digest for row in found.rows[: len(presets)]] == presets
    assert len(found.rows) == len({digest(config) for _, config in points(searched.space, num_steps=NUM_STEPS)})
    assert {row.digest for row in found.rows} < {row.digest for row in table.rows}


def test_a_trial_that_ends_at_a_rung_costs_less_and_no_member_of_the_front_does(table):
    """Scores without noise leave the exact rule alone, and grid draws the same points whatever it is told."""
    searched = way(table, "grid", "ladder", has_presets=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = replay(searched, table, seed=0, num_trials=200)
        short = replay(replace(searched, has_rungs=True), table, seed=0, num_trials=200)
    worst = (0.0, 1.0)

    assert short.rows == whole.rows
    assert 0 < sum(short.ended) < len(short.rows)
    assert sum(whole.seconds) - sum(short.seconds) == pytest.approx(sum(short.ended) / 2)
    areas = [areas_over_time(found.rows, worst, found.ended) for found in (short, whole)]
    assert areas[0] == pytest.approx(areas[1], rel=1e-12)
