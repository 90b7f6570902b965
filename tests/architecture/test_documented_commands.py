"""docs/cli.md is the contract of the command line; what it promises is compared with what the commands offer."""

import re
from pathlib import Path

import pytest
import typer.main

from search.cli import app

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
GROUP = typer.main.get_command(app)


def section(name: str) -> str:
    """Return what docs/cli.md says about one command."""
    sections = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return next((text for text in sections if text.splitlines()[0] == name), "")


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_every_command_and_each_of_its_options_is_documented(name):
    text = section(name)
    options = {
        option for parameter in GROUP.commands[name].params for option in parameter.opts if option.startswith("--")
    }

    assert text, f"docs/cli.md has no section '## {name}'"
    assert {option for option in options - {"--help"} if option not in text} == set()


def test_every_documented_command_exists():
    headings = re.findall(r"^## ([a-z]+(?:-[a-z]+)*)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert set(headings) == set(GROUP.commands)


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_every_command_says_in_one_sentence_what_it_does(name):
    summary = (GROUP.commands[name].help or "").splitlines()[0]

    assert summary.endswith(".")
