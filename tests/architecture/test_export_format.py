"""The example of docs/export-format.md is run, and its tables name what the manifest has."""

import re
from pathlib import Path

from hyquant.export import ExportManifest

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "export-format.md").read_text(encoding="utf-8")


def test_the_example_of_the_export_format_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(compile(code, "export-format.md", "exec"), {})

    assert len(list((tmp_path / "export").glob("*_1.*"))) == 2


def test_every_field_of_the_manifest_is_described():
    table = TEXT.split("## The manifest")[1].split("\n## ")[0]

    assert set(re.findall(r"`(\w+)`", table)) >= set(ExportManifest.model_fields)
