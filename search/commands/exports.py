"""Commands about exported weights: export, verify, render."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hyquant.config import Target
from search.commands.options import AsJson, Kernel, Storage, Store, Study
from search.console import print_json, print_line, remark

Export = Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder that `hyq-search export` wrote.")]
Source = Annotated[
    str | None, typer.Option("--model", help="Where the float weights are [default: where the export says].")
]


def export(
    study: Study,
    pick: Annotated[str, typer.Option(help="safe, balanced, fast, or a trial's number.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    layout: Annotated[Literal["original", "diffusers"], typer.Option(help="Whose layer names to write.")] = "original",
    target: Annotated[
        Target | None, typer.Option(help="What will execute the weights [default: the study's target].")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Write a copy per rank, named _0, _1, ... [default: one for any number].", min=1)
    ] = None,
    part_size: Annotated[
        float | None, typer.Option(help="Most GB in one tensor file; more make parts and an index.", min=1e-6)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there already.")] = False,
    store: Store = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Quantize the model as a trial did, and write the weights."""
    from hyquant.export.snippets import hyquant_snippet, mindie_snippet
    from search.answers import report_json, trial_json
    from search.exporting import ExportShape, export_config, find_pick
    from search.locate import locate_study, opened_study, overview_of
    from search.storage import stored_prompts

    ref = locate_study(study, store, storage)
    overview = overview_of(ref)
    row = find_pick(overview, pick)
    assert row.config is not None
    if row.state != "complete":
        remark(f"trial {row.number} is {row.state}: {row.reason}")
    with opened_study(ref) as opened:
        prompts = stored_prompts(opened)
    changes = {"store": str(ref.store)} | ({} if target is None else {"target": target})
    config = overview.config.model_copy(update=changes)
    shape = ExportShape(
        layout=layout, num_ranks=ranks, part_size_bytes=None if part_size is None else round(part_size * 1e9)
    )
    done = export_config(config, prompts, row.config, out, shape=shape, overwrite=overwrite)
    if as_json:
        answer = trial_json(row)
        about = {key: answer[key] for key in ("number", "picks", "values", "config", "config_digest")}
        files = {name: info.size_bytes for name, info in done.manifest.files.items()}
        settled = {
            "study": overview.config.name,
            "out": str(out),
            "layout": layout,
            "target": config.target,
            "files": files,
        }
        print_json({**settled, "trial": about, "verify": report_json(done.report)})
    else:
        print_line(f"exported trial {row.number} ({row.strategy}) of {overview.config.name} to {out}")
        for name, info in done.manifest.files.items():
            print_line(f"  {name}  {info.size_bytes / 1e6:.1f} MB")
        print_line(f"verified: {'ok' if done.report.ok else 'PROBLEMS'}, {done.report.layers} quantized layers")
        _print_snippet("load it in Python:", hyquant_snippet(out, done.manifest))
        _print_snippet("load it in MindIE-SD:", mindie_snippet(out, done.manifest))
    _stop_on_problems(done.report.problems)


def verify(
    folder: Export,
    model: Source = None,
    target: Annotated[
        Target | None, typer.Option(help="What will execute the weights [default: what the export says].")
    ] = None,
    allow_ignored: Annotated[
        bool, typer.Option("--allow-ignored", help="Accept layers that the target leaves in float.")
    ] = False,
    engine: Annotated[bool, typer.Option("--engine", help="Load it through the installed MindIE-SD too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check that an export is whole and does what the float model does; exit code 3 if not."""
    from search.verifying import verify_folder

    verdict = verify_folder(folder, source=model, target=target, with_engine=engine)
    if as_json:
        print_json(verdict.json())
    else:
        for line in verdict.lines():
            print_line(line)
    for ignored in verdict.report.ignored if not allow_ignored else ():
        remark(f"{ignored.name} stays in float: {ignored.reason}")
    _stop_on_problems(verdict.problems, is_bad=bool(verdict.report.ignored) and not allow_ignored)


def render(
    export: Export,
    prompt: Annotated[list[str], typer.Option(help="What to show; may be given several times.")],
    seed: Annotated[
        int, typer.Option(help="Seed of the first clip; each further clip adds one.", min=0, max=2**32 - 1)
    ] = 42,
    out: Annotated[Path | None, typer.Option(help="Folder to write into [default: EXPORT-render].")] = None,
    model: Source = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip.", min=1)] = None,
    kernel: Kernel = None,
    as_json: AsJson = False,
) -> None:
    """Render clips with exported weights beside the float model's."""
    from search.kernels import force_kernel
    from search.rendering import clip_settings, load_float_model, made_folder, render_export

    force_kernel(kernel, "auto")
    settings = clip_settings(export, size=size, num_frames=frames)
    folder = out or export.with_name(f"{export.name}-render")
    with made_folder(folder):
        float_model = load_float_model(export, source=model)
        size_in_words = f"{settings.width}x{settings.height}, {settings.num_frames} frames"
        remark(f"rendering {len(prompt)} clips of {size_in_words}, twice")
        files = render_export(float_model, export, prompt, settings, seed=seed, out=folder)
    if as_json:
        names = [str(path) for path in files]
        print_json({"export": str(export), "prompts": prompt, "seed": seed, "files": names, "settings": dict(settings)})
        return
    for path in files:
        print_line(str(path))


def _print_snippet(title: str, snippet: str | None) -> None:
    if snippet is not None:
        print_line(title)
        for line in snippet.splitlines():
            print_line(f"  {line}")


def _stop_on_problems(problems: tuple[str, ...], *, is_bad: bool = False) -> None:
    for problem in problems:
        remark(problem)
    if problems or is_bad:
        raise typer.Exit(3)
