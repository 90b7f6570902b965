"""The report of a study: its table, front, parameter importances and study file, as files for people and programs."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import optuna
import yaml

from search.answers import devices_note, table_row, trials_json
from search.importances import importances
from search.latent_plots import save_latent_png
from search.overview import read_overview
from search.plot_data import front_plot
from search.plots import save_front_html, save_front_png, save_importances_png
from search.study import StudyConfig


def write_study_report(folder: Path, config: StudyConfig, study: optuna.Study) -> None:
    """Write a study's report into a folder, which is made if need be.

    front.png, front.html, latent_l2.png, importances.json and .png (from ten complete trials on), trials.csv, .md and
    .json, study.yaml.

    Raises:
        StoreError: If the study was not made by hyq-search.
    """
    folder.mkdir(parents=True, exist_ok=True)
    overview = read_overview(study)
    shares = importances(study, config.objectives)
    plot = front_plot(overview)
    save_front_png(folder / "front.png", plot)
    save_front_html(folder / "front.html", plot)
    save_latent_png(folder / "latent_l2.png", overview)
    if shares:
        (folder / "importances.json").write_text(json.dumps(shares, indent=2) + "\n", encoding="utf-8")
        save_importances_png(folder / "importances.png", shares)
    rows = [table_row(row, overview.config.space) for row in overview.rows]
    (folder / "trials.csv").write_text(as_csv(rows), encoding="utf-8")
    note = devices_note(overview)
    (folder / "trials.md").write_text(as_markdown(rows) + (f"\n{note}\n" if note else ""), encoding="utf-8")
    (folder / "trials.json").write_text(json.dumps(trials_json(overview), indent=2) + "\n", encoding="utf-8")
    text = yaml.safe_dump(config.stored_form(), sort_keys=False, allow_unicode=True)
    (folder / "study.yaml").write_text(text, encoding="utf-8")


def as_csv(rows: Sequence[dict[str, str]]) -> str:
    """Return table rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return table rows as a Markdown table."""
    columns = _columns(rows)
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(column, "").replace("|", "\\|").replace("\n", " ") for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _columns(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return the columns of all rows, those of the fullest row first and in its order."""
    fullest = max(rows, key=len, default={})
    return [*fullest, *sorted({name for row in rows for name in row} - set(fullest))]
