"""What the READMEs show must exist: commands, options, make targets, files, pictures, and code that runs."""

import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.core import TyperCommand

from hyquant.models.mini import WEIGHTS
from hyquant.modules.linear import QuantLinear
from metrics.base import Sample
from metrics.hashing import HashingEmbedder
from metrics.registry import find_metric
from metrics.score import score_samples
from search.cli import app

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh.md")
COMMANDS: dict[str, TyperCommand] = typer.main.get_command(app).commands
COMMAND = re.compile(r"hyq-search ([a-z]+(?:-[a-z]+)*)\b([^`\n]*)")
WAITS = "<!-- MEASURED"

both = pytest.mark.parametrize("name", READMES)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_of(name: str) -> list[str]:
    """Return what is marked as code: fenced and indented blocks, and what stands between backticks."""
    text = text_of(name)
    indented = re.findall(r"^ {4,}\S.*$", text, flags=re.MULTILINE)
    return [*indented, *re.findall(r"`([^`\n]+)`", text), *re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)]


def commands_in(name: str) -> list[tuple[str, str]]:
    return [found for code in code_of(name) for found in COMMAND.findall(code)]


def make_targets_in(name: str) -> set[str]:
    return {target for code in code_of(name) for target in re.findall(r"\bmake ([a-z]+)\b", code)}


def links_in(name: str) -> set[str]:
    found = re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(name))
    return {link for link in found if "://" not in link}


@both
def test_every_named_command_exists_with_every_named_option(name):
    unknown = []
    for command, rest in commands_in(name):
        known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
        options = [word for word in shlex.split(rest, comments=True) if word.startswith("--")]
        unknown += [f"{command} {option}" for option in options if option not in known]

    assert {command for command, _ in commands_in(name)} == set(COMMANDS)
    assert unknown == []


@both
def test_every_named_make_target_exists(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")

    assert {"study", "test"} <= make_targets_in(name)
    assert make_targets_in(name) <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))


@both
def test_every_linked_file_exists(name):
    files = {link for link in links_in(name) if not link.startswith("docs/images/")}

    assert {link for link in files if not (ROOT / link).exists()} == set()


@both
def test_every_picture_exists(name):
    pictures = {link for link in links_in(name) if link.startswith("docs/images/")}
    if WAITS in text_of(name):
        pytest.skip(f"{name} still waits for the numbers and pictures of a finished mini study")

    assert {picture for picture in pictures if not (ROOT / picture).is_file()} == set()


@both
def test_every_named_study_and_constraints_file_exists(name):
    files = set(re.findall(r"\b(?:studies/[\w.]+\.yaml|constraints[\w-]*\.txt)", text_of(name)))

    assert {file for file in files if not (ROOT / file).is_file()} == set()


def test_the_chinese_readme_names_the_same_commands_pictures_and_files():
    english, chinese = READMES

    assert links_in(chinese) - {english} == links_in(english) - {chinese}
    assert commands_in(chinese) == commands_in(english)
    assert make_targets_in(chinese) == make_targets_in(english)
    assert text_of(chinese).count(WAITS) == text_of(english).count(WAITS)


def test_the_chinese_readme_shows_the_same_code():
    blocks = [re.findall(r"```(\w+)\n(.*?)```", text_of(name), flags=re.DOTALL) for name in READMES]

    assert blocks[0] == blocks[1]


def test_the_metric_of_the_readme_is_found_as_an_entry_point_and_scores_a_video(tmp_path, monkeypatch):
    blocks = re.findall(r"```\w+\n(.*?)```", text_of("README.md"), flags=re.DOTALL)
    source = next(block for block in blocks if block.startswith("# hyq_sharpness.py"))
    project = next(block for block in blocks if block.startswith("# pyproject.toml"))
    entry = re.search(r'"hyq\.metrics"\]\n(\w+) = "([\w:]+)"', project)
    assert entry is not None
    (tmp_path / "hyq_sharpness.py").write_text(source)
    info = tmp_path / "hyq_sharpness-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hyq-sharpness\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[hyq.metrics]\n{entry[1]} = {entry[2]}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    video = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    spec = find_metric("sharpness_ratio")
    samples = [Sample("a prompt", video / 2, video), Sample("a prompt", video, video)]
    scores = score_samples(samples, ["sharpness_ratio"], HashingEmbedder())
    sys.modules.pop("hyq_sharpness", None)

    assert spec.name == entry[1]
    assert scores == {"sharpness_ratio": [pytest.approx(0.5), pytest.approx(1.0)]}


def test_python_of_the_readme_compiles():
    for block in re.findall(r"```python\n(.*?)```", text_of("README.md"), flags=re.DOTALL):
        compile(textwrap.dedent(block), "README.md", "exec")


def test_the_library_example_of_the_readme_renders_an_int8_video():
    """With two denoising steps instead of twenty, which is all that would take its time."""
    blocks = re.findall(r"```python\n(.*?)```", text_of("README.md"), flags=re.DOTALL)
    example = next(block for block in blocks if "quantize_(" in block)
    if not any((WEIGHTS / "transformer").glob("*.safetensors")):
        pytest.skip("the weights of the mini model are missing")

    names: dict[str, Any] = {}
    exec(compile(example.replace("num_steps=20", "num_steps=2"), "README.md", "exec"), names)

    assert names["plan"].num_steps == 2
    assert names["video"].shape == (13, 3, 64, 64)
    assert len(names["report"].layers) == len(names["plan"].quantized) > 0
    assert not any(isinstance(module, QuantLinear) for module in names["model"].denoiser.modules())
