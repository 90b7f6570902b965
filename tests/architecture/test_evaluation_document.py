"""docs/evaluation.md: its tables are those of the code and of the tests."""

import re
from pathlib import Path

from metrics.collapsed import DETECTORS
from metrics.registry import METRICS
from tests.metrics_tests.test_damage import BOUNDS, SEEN_BY

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
BETTER = {"maximize": "higher", "minimize": "lower"}


def rows_under(heading: str) -> list[list[str]]:
    """Return the cells of the table whose first heading is given."""
    table = re.search(rf"^\| {heading} \|.*\n\| ---.*\n((?:\|.*\n)+)", TEXT, flags=re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_the_table_of_metrics_is_the_one_of_the_code():
    facts = [
        [f"`{name}`", BETTER[spec.direction], spec.unit, spec.cost, spec.looks_at, spec.blind_to]
        for name, spec in METRICS.items()
    ]

    assert rows_under("metric")[: len(facts)] == facts


def test_the_table_of_damage_marks_what_the_tests_see():
    columns = re.search(r"^\| damage \| (.*) \|$", TEXT, flags=re.MULTILINE)[1].split(" | ")
    names = [column.removesuffix(" drop") for column in columns]
    marked = {
        row[0]: {name for name, cell in zip(names, row[1:], strict=True) if cell.startswith("**")}
        for row in rows_under("damage")[1:]
    }

    assert set(names) == {*BOUNDS, "motion_energy_ratio"}
    assert marked == SEEN_BY


def test_every_detector_is_described():
    assert [row[0] for row in rows_under("detector")] == list(DETECTORS)
