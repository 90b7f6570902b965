"""Documents: links lead somewhere, decisions are complete, and nothing in them belongs to one machine."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "containers").glob("*.md")])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_to_a_file_leads_somewhere(path):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    files = {target for target in targets if "://" not in target and "docs/images/" not in target}

    assert {target for target in files if not (path.parent / target).exists()} == set()


@pytest.mark.parametrize("path", DECISIONS, ids=name_of)
def test_a_decision_has_context_decision_and_consequences_on_one_page(path):
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)

    assert text.startswith(f"# {path.name[:4]} ")
    assert headings == ["Context", "Decision", "Consequences"]
    assert len(text.splitlines()) <= 60


def test_decisions_are_numbered_without_gaps_and_all_listed():
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (ROOT / "docs" / "decisions" / "README.md").read_text())

    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    assert listed == [path.name for path in DECISIONS]


def test_every_decision_that_a_document_cites_by_number_exists():
    numbers = {path.name[:4] for path in DECISIONS}
    cited = {number for path in DOCUMENTS for number in re.findall(r"decision (\d{4})", path.read_text())}

    assert cited <= numbers
