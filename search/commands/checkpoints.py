"""Commands about checkpoints that are too large to load: calibrate (writes statistics) and quantize-checkpoint."""

import shlex
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from hyquant.config import Target
from search.commands.options import AsJson, Storage, Store, Study
from search.console import print_json, print_line, remark

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]

_PROGRESS_S = 5.0


def calibrate(
    study: Study,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The quantization config to calibrate for.")],
    out: Annotated[Path, typer.Option(help="File to write, such as stats.safetensors.")],
    overwrite: Overwrite = False,
    store: Store = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Write what a study's captured inputs say about a config, for quantize-checkpoint."""
    from search.calibrating import write_statistics
    from search.config_file import load_config
    from search.locate import config_to_run, locate_study, prompts_to_run

    point = load_config(config)
    ref = locate_study(study, store, storage)
    study_config, prompts = config_to_run(ref)[0], prompts_to_run(ref)
    info = write_statistics(study_config, prompts, point, out, overwrite=overwrite)
    size_bytes = out.stat().st_size
    if as_json:
        about = info.model_dump(mode="json", include={"config", "num_steps", "denoiser", "dtype"})
        print_json({"study": study_config.name, "out": str(out), "size_bytes": size_bytes, **about})
        return
    print_line(f"wrote {out}: {size_bytes / 1e6:.1f} MB, {info.num_steps} steps, denoiser {info.denoiser}")
    files = shlex.join(["--config", str(config), "--stats", str(out)])
    print_line(f"next: hyq-search quantize-checkpoint --in DIR --out DIR {files}")


def quantize_checkpoint(
    source: Annotated[
        Path, typer.Option("--in", help="Float checkpoint: a file, or a folder of one or a whole model.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    config: Annotated[Path, typer.Option(metavar="CONFIG.yaml", help="A quantization config, written by hand.")],
    stats: Annotated[
        Path | None, typer.Option(help="Statistics that `hyq-search calibrate` wrote [default: none].")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps to plan for [default: the statistics', else 50].", min=1)
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Dtype in which the float model runs [default: the checkpoint's]."),
    ] = None,
    layout: Annotated[Literal["original", "diffusers"], typer.Option(help="Whose layer names to write.")] = "original",
    target: Annotated[Target, typer.Option(help="What will execute the weights.")] = "hyquant",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a checkpoint of any size in little memory, and go on where a killed run stopped."""
    from hyquant.checkpoint import quantize_checkpoint as quantize
    from hyquant.export.snippets import hyquant_snippet
    from search.config_file import load_config

    point = load_config(config)
    started = shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _PROGRESS_S:
            shown = time.monotonic()
            remark(f"quantized {done / 1e9:.1f} of {total / 1e9:.1f} GB in {shown - started:.0f} s")

    report = quantize(
        source,
        out,
        point,
        stats=stats,
        num_steps=steps,
        dtype=dtype,
        target=target,
        layout=layout,
        overwrite=overwrite,
        on_progress=show,
    )
    manifest = report.manifest
    if report.discarded:
        remark("what was begun was of other weights or settings and was thrown away")
    if report.resumed_units:
        remark(f"{report.resumed_units} of {report.units} parts were there from an earlier run")
    if as_json:
        print_json(
            {
                "in": str(source),
                "out": str(out),
                "layout": layout,
                "target": target,
                "files": {name: info.size_bytes for name, info in manifest.files.items()},
                "layer_counts": manifest.layer_counts,
                "denoiser": manifest.model.fingerprint,
                "resumed": report.resumed_units,
            }
        )
        return
    print_line(f"quantized {source} ({manifest.model.dtype}, denoiser {manifest.model.fingerprint}) to {out}")
    for name, info in manifest.files.items():
        print_line(f"  {name}  {info.size_bytes / 1e6:.1f} MB")
    print_line("load it in Python:")
    for line in (hyquant_snippet(out, manifest) or "").splitlines():
        print_line(f"  {line}")
