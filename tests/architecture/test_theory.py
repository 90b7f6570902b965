"""The examples in docs/theory.md are run, and the modules it refers to exist."""

import doctest
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "theory.md"


def test_the_examples_of_the_theory_are_what_the_code_does():
    result = doctest.testfile(str(DOCUMENT), module_relative=False, encoding="utf-8")

    assert result.attempted > 20
    assert result.failed == 0


def test_every_file_that_the_theory_describes_exists():
    text = DOCUMENT.read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:hyquant|metrics|search|spaces|tools)/[\w/.]*)`", text))

    assert len(paths) > 15
    assert {path for path in paths if not (ROOT / path).exists()} == set()
