import random

import pytest

from hyquant.config import LayerSelection, QuantConfig, W8A8Dynamic, digest
from tools.bench.tabular.table import About, Row, append_line, read_table
from tools.bench.tabular.volume import area


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
