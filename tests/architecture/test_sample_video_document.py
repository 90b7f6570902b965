"""docs/sample_video.md: its commands run, and its table is that of the command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hyquant.export import read_manifest
from hyquant.video.arguments import Arguments, Quantization, flag
from hyquant.video.flags import build_parser

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "sample_video.md").read_text(encoding="utf-8")
ROWS = {
    cells[1].strip().strip("`"): [cell.strip() for cell in cells[2:5]]
    for line in TEXT.splitlines()
    if line.startswith("| `--")
    for cells in [line.split("|")]
}
MEANT = {"--embedded-cfg-scale": "6.0", "--act-method": "minmax"}
"""What is used where nothing is given, so that what was given can be told apart."""

FIELDS = {flag(name): field for kind in (Arguments, Quantization) for name, field in kind.model_fields.items()}


@pytest.mark.multiproc
@pytest.mark.slow
def test_the_commands_run_as_they_stand(tmp_path):
    for block in re.findall(r"```shell\n(.*?)```", TEXT, flags=re.DOTALL):
        done = subprocess.run(
            ["bash", "-e", "-c", block],
            cwd=tmp_path,
            env=os.environ
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr

    assert len(list((tmp_path / "results").glob("*.mp4"))) == 4
    assert read_manifest(tmp_path / "results" / "quant" / "safetensors").static_steps == (10, 20)
    assert read_manifest(tmp_path / "results" / "m4").layer_counts["smoothed"] == 2


def test_every_flag_has_a_row_and_every_row_a_flag():
    flags = {option for action in build_parser()._actions for option in action.option_strings}

    assert set(ROWS) == flags - {"-h", "--help"}


@pytest.mark.parametrize("name", ROWS)
def test_a_default_that_the_table_tells_is_the_one_in_use(name):
    told = re.match(r"`([^`]+)`", ROWS[name][1])
    if name == "--do_quant":
        return
    default = FIELDS[name].default
    if told is None:
        assert default is None or default is False or FIELDS[name].is_required()
        return
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    assert told[1] == MEANT.get(name, shown)


def test_the_table_tells_all_choices():
    for action in build_parser()._actions:
        for choice in action.choices or ():
            row = " ".join(ROWS[action.option_strings[0]])
            assert f"`{choice}`" in row, f"{action.option_strings[0]} {choice}"
