"""The command sensitivity: which Linears the denoiser's output suffers from."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from search.commands.options import AsJson, Storage, Store, Study
from search.console import print_json, print_line, print_table, remark

if TYPE_CHECKING:
    from hyquant.sensitivity.map import SensitivityMap

_TOP, _BOTTOM = 10, 5
_PROGRESS_S = 5.0

Scheme = Literal["dynamic", "static", "w8a16", "w4a16", "w4a8", "w4a4_dynamic"]


def sensitivity(
    study: Study,
    scheme: Annotated[Scheme, typer.Option(help="What a probed layer is quantized to.")] = "dynamic",
    ranges: Annotated[int, typer.Option(help="Ranges of steps; the middle step of each is probed.", min=1)] = 3,
    prompts: Annotated[int, typer.Option(help="Calibration prompts to probe on.", min=1)] = 2,
    band: Annotated[int, typer.Option(help="Adjacent blocks that are probed together.", min=1)] = 1,
    store: Store = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Measure how much each kind of Linear in each block harms the denoiser's output, and order a ladder by it."""
    from hyquant.sensitivity.ladder import ladder
    from search.locate import config_to_run, locate_study, prompts_to_run
    from search.sensitivity import ProbeOptions, measure_sensitivity
    from search.sensitivity_plots import save_sensitivity_html, save_sensitivity_png

    ref = locate_study(study, store, storage)
    config = config_to_run(ref)[0]
    shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _PROGRESS_S:
            shown = time.monotonic()
            remark(f"probed {done} of {total}")

    options = ProbeOptions(scheme=scheme, num_ranges=ranges, num_prompts=prompts, width=band)
    found, path = measure_sensitivity(config, prompts_to_run(ref), options, on_probe=show)
    title = f"{config.name}: one kind of Linear in one block quantized ({scheme}), the rest in float"
    files = {kind: path.with_suffix(f".{kind}") for kind in ("json", "png", "html")}
    save_sensitivity_png(files["png"], found, title)
    save_sensitivity_html(files["html"], found, title)
    if as_json:
        print_json(_answer(config.name, found, files))
        return
    rows = _rows(found)
    print_table(rows if len(rows) <= _TOP + _BOTTOM else [*rows[:_TOP], *rows[-_BOTTOM:]])
    if len(rows) > _TOP + _BOTTOM:
        print_line(f"the {_TOP} most and the {_BOTTOM} least sensitive of {len(rows)}; all are in {files['html']}")
    print_line(
        f"{_cost(found)}, {found.seconds:.3g} s; {found.subject.num_prompts} prompts, {len(found.subject.ranges)} of "
        f"{found.subject.num_steps} steps, {found.subject.dtype} on {found.subject.device}"
    )
    steps = ladder(found)
    print_line(f"ladder of {steps.height} rungs; what each keeps in float:")
    for rung in range(1, steps.height + 1):
        print_line(
            f"  {rung}: {len(steps.excluded(rung))} of {len(steps.layers)}, with {_listed(steps.rungs[rung - 1])}"
        )
    print_line(f"wrote {', '.join(str(file) for file in files.values())}")


def _answer(study: str, found: "SensitivityMap", files: dict[str, Path]) -> dict[str, Any]:
    from hyquant.config import digest
    from hyquant.sensitivity.ladder import ladder
    from hyquant.sensitivity.map import by_band

    steps = ladder(found)
    return {
        "study": study,
        "subject": digest(found.subject),
        **found.subject.model_dump(
            mode="json", include={"model", "dtype", "device", "scheme", "num_prompts", "ranges"}
        ),
        "bands": [
            {"block": block, "kind": kind, "sensitivity": value if value < float("inf") else None}
            for (block, kind), value in sorted(by_band(found).items(), key=lambda entry: -entry[1])
        ],
        "rows": [row.model_dump(mode="json") for row in found.rows],
        "ladder": [list(steps.patterns(rung)) for rung in range(steps.height + 1)],
        "forwards": {**found.cost.model_dump(), "keeps_blocks": found.keeps_blocks},
        "seconds": found.seconds,
        "files": {kind: str(file) for kind, file in files.items()},
    }


def _rows(found: "SensitivityMap") -> list[dict[str, str]]:
    """Return a table row per band, the most sensitive first."""
    from hyquant.sensitivity.map import by_band

    errors = {(row.block, row.kind, row.first_step): row.relative_l2 for row in found.rows}
    rows = []
    for (block, kind), value in sorted(by_band(found).items(), key=lambda entry: -entry[1]):
        row = {"block": block, "kind": kind, "relative L2": _number(value)}
        for part in found.subject.ranges:
            row[part.label] = _number(errors[block, kind, part.first])
        rows.append(row)
    return rows


def _number(value: float | None) -> str:
    return "not finite" if value is None or value == float("inf") else f"{value:.3g}"


def _cost(found: "SensitivityMap") -> str:
    whole = f"{found.cost.whole:.0f} forwards"
    if not found.keeps_blocks:
        return f"{whole}, whole because this model hands tensors past its blocks"
    return f"the work of {found.cost.kept:.0f} instead of {whole}, with earlier blocks' outputs kept"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
