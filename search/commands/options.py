"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Study = Annotated[
    str, typer.Argument(metavar="STUDY", help="Path of a study file, or the name of a study in the store.")
]
Store = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of databases and results [default: the study file's `store`, else ./mlruns]."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON; see docs/cli.md.")]
Kernel = Annotated[
    str | None,
    typer.Option(
        "--kernel", help="Kernel of every quantized Linear; see doctor --kernels [default: the fastest measured]."
    ),
]
