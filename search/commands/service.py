"""Commands that look: ui (the MLflow pages of a study) and doctor (what this installation has and lacks)."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from search.commands.options import AsJson, Storage, Store, Study, TrackingUri
from search.console import print_json, print_line, print_table, remark
from search.errors import SearchError


def ui(
    study: Study,
    store: Store = None,
    port: Annotated[int, typer.Option(help="Port to serve on.", min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option(help="Address to serve on; all but loopback is open to others.")] = "127.0.0.1",
) -> None:
    """Serve the MLflow pages of the study's store, to this machine only unless --host is given, until Ctrl-C."""
    from search.locate import locate_study
    from search.ui import LOOPBACK, server_command, server_environment

    ref = locate_study(study, store)
    command = server_command(ref.store, port, host)
    remark(f"MLflow for {ref.store} at http://{host}:{port} (Ctrl-C ends it)")
    if host not in LOOPBACK:
        remark(f"whoever reaches {host} can read, change and delete these runs, for MLflow asks for no password")
    sys.stderr.flush()
    os.execve(command[0], command, {**os.environ, **server_environment()})


def doctor(
    study: Annotated[
        str | None, typer.Argument(metavar="[STUDY]", help="Also check this study's databases.", show_default=False)
    ] = None,
    store: Store = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is wrong with STUDY.")] = False,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels", help="Show instead how fast each int8 kernel is here, for STUDY's model or the usual."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check packages, devices, compiler, weights, codec and disk, and where the parts of a study disagree."""
    from search.doctor import examine

    if kernels:
        _kernels(study, store, storage, as_json)
        return
    if repair and study is None:
        raise SearchError("doctor --repair mends a study, but got none; give STUDY")
    checks = examine(study, store, storage=storage, tracking=tracking_uri, is_repair=repair)
    problems = [check for check in checks if check.verdict == "problem"]
    if as_json:
        print_json({"ok": not problems, "checks": [check.as_json() for check in checks]})
    else:
        for check in checks:
            print_line(f"{check.verdict:8}{check.name}: {check.found}")
            if check.way_out:
                print_line(f"{'':8}  -> {check.way_out}")
    if problems:
        raise typer.Exit(3)


def _kernels(study: str | None, store: Path | None, storage: str | None, as_json: bool) -> None:
    from search.kernels import HEADS, attention_table, kernel_table, model_shapes, usual_shapes

    device, shapes, heads = "auto", usual_shapes(), list(HEADS)
    if study is not None:
        from search.locate import config_to_run, locate_study

        model = config_to_run(locate_study(study, store, storage))[0].model
        device = model.device
        shapes, heads = model_shapes(model.kind, model.source, device=device, dtype=model.dtype)
    remark(
        "times are medians of single calls; those of Linears are measured once per machine and kept in the user's cache"
    )
    rows = kernel_table(shapes, device) + attention_table(heads, device)
    if as_json:
        print_json([row.as_json() for row in rows])
        return
    print_table(
        [
            {
                "shape": row.shape,
                "kernel": row.kernel,
                "kind": row.kind,
                "ms a call": f"{row.time_s * 1e3:.3f}",
                "GOPS": f"{row.gops:.0f}",
                "chosen": "yes" if row.is_chosen else "",
            }
            for row in rows
        ]
    )
