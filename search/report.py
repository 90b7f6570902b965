"""The report of a study: its table, front, parameter importances and study file, as files for people and programs."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml

from hyquant.export import VerifyReport
from search.importances import importances
from search.logged import config_params
from search.media import plain
from search.overview import Overview, TrialRow, read_overview
from search.plot_data import front_plot
from search.plots import save_front_html, save_front_png, save_importances_png
from search.result import LatencyResult
from search.study import StudyConfig

_CONFIG_COLUMNS = ("linear.act_method", "linear.timestep_sep", "smoothing.kind", "layers.exclude")


def write_study_report(folder: Path, config: StudyConfig, study: optuna.Study) -> None:
    """Write a study's report into a folder, which is made if need be.

    front.png, front.html, importances.json and .png (from ten complete trials on), trials.csv, .md, .json, study.yaml.

    Raises:
        StoreError: If the study was not made by hyq-search.
    """
    folder.mkdir(parents=True, exist_ok=True)
    overview = read_overview(study)
    shares = importances(study, config.objectives)
    plot = front_plot(overview)
    save_front_png(folder / "front.png", plot)
    save_front_html(folder / "front.html", plot)
    if shares:
        (folder / "importances.json").write_text(json.dumps(shares, indent=2) + "\n", encoding="utf-8")
        save_importances_png(folder / "importances.png", shares)
    rows = [table_row(row) for row in overview.rows]
    (folder / "trials.csv").write_text(as_csv(rows), encoding="utf-8")
    (folder / "trials.md").write_text(as_markdown(rows), encoding="utf-8")
    (folder / "trials.json").write_text(json.dumps(trials_json(overview), indent=2) + "\n", encoding="utf-8")
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (folder / "study.yaml").write_text(text, encoding="utf-8")


def table_row(row: TrialRow) -> dict[str, str]:
    """Return one trial as short texts by column; what it does not have is empty."""
    params = {} if row.config is None else config_params(row.config)
    return {
        "trial": str(row.number),
        "state": row.state,
        "front": ", ".join(row.picks) or ("yes" if row.is_on_front else ""),
        "strategy": row.strategy or "",
        **{name: f"{value:.5g}" for name, value in (row.values or {}).items()},
        **{name.split(".")[-1]: params.get(name, "") for name in _CONFIG_COLUMNS},
        "seconds": "" if row.duration_s is None else f"{row.duration_s:.1f}",
        "reason": row.reason or "",
    }


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


def status_json(overview: Overview) -> dict[str, Any]:
    """Return the answer of `hyq-search status --json`; documented in docs/cli.md."""
    budget = overview.config.budget
    return {
        "study": overview.config.name,
        "trials": dict(overview.counts),
        "evaluated": overview.num_evaluated,
        "budget": {"trials": budget.trials, "time_s": budget.time_s},
        "front_size": len(overview.front),
        "picks": {name: row.number for row in overview.front for name in row.picks},
        "median_trial_s": overview.time_per_trial_s,
    }


def front_json(overview: Overview) -> list[dict[str, Any]]:
    """Return the answer of `hyq-search front --json`; documented in docs/cli.md."""
    keys = ("number", "picks", "values", "config", "config_digest", "strategy", "metrics", "latency")
    return [{key: row[key] for key in keys} for row in map(trial_json, overview.front)]


def trials_json(overview: Overview) -> list[dict[str, Any]]:
    """Return all trials as in `hyq-search show --json`."""
    return [trial_json(row) for row in overview.rows]


def trial_json(row: TrialRow) -> dict[str, Any]:
    """Return the answer of `hyq-search show --json`; documented in docs/cli.md."""
    result = row.result
    answer = {
        "number": row.number,
        "state": row.state,
        "reason": row.reason,
        "picks": list(row.picks),
        "on_front": row.is_on_front,
        "values": row.values,
        "strategy": row.strategy,
        "preset": row.preset,
        "config": row.config,
        "config_digest": None if result is None else result.config_digest,
        "metrics": {} if result is None else result.metrics,
        "constraints": {} if result is None else result.constraints,
        "latency": None if result is None else result.latency,
        "weight_bytes": None if result is None else result.weight_bytes,
        "stage_seconds": {} if result is None else result.stage_seconds,
        "duration_s": row.duration_s,
    }
    return {key: plain(value) for key, value in answer.items()}


def report_json(report: VerifyReport) -> dict[str, Any]:
    """Return the answer of `hyq-search verify --json`; documented in docs/cli.md."""
    answer: dict[str, Any] = plain(report)
    return answer


def trial_lines(row: TrialRow) -> list[str]:
    """Return what there is to know about one trial, as lines for people."""
    offered = f", offered as {' and '.join(row.picks)}" if row.picks else ""
    lines = [f"trial {row.number}: {row.state}{', on the front' if row.is_on_front else ''}{offered}"]
    if row.reason:
        lines.append(f"reason: {row.reason}")
    if row.preset:
        lines.append(f"preset: {row.preset}")
    if row.config is not None:
        lines += ["config:", *(f"  {key}: {value or '-'}" for key, value in config_params(row.config).items())]
    if row.result is not None:
        lines += ["scores over the prompts:"]
        lines += [f"  {name}: {m.mean:.5g} (std {m.std:.2g})" for name, m in row.result.metrics.items()]
        lines += [f"  bound on {name} is exceeded by {v:.3g}" for name, v in row.result.constraints.items() if v > 0]
        lines += _latency_lines(row.result.latency)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in row.result.stage_seconds.items())
        lines.append(f"time: {stages}")
    return lines


def _latency_lines(latency: LatencyResult | None) -> list[str]:
    if latency is None:
        return ["latency: not measured"]
    how = f"{latency.kind}, {'compiled' if latency.compiled else 'not compiled'}, {latency.device}, {latency.shape}"
    return [
        f"latency: {latency.ratio:.3f} of float (MAD {latency.ratio_mad:.2g}), "
        f"{latency.loop_latency_s:.3g} s against {latency.control_loop_latency_s:.3g} s a clip",
        f"  {how}; {latency.rounds} rounds after {latency.warmup} of warm-up",
    ]


def _columns(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return the columns of all rows, those of the fullest row first and in its order."""
    fullest = max(rows, key=len, default={})
    return [*fullest, *sorted({name for row in rows for name in row} - set(fullest))]
