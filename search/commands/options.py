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
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="Database of the study, if it is not in the store: postgresql://, mysql:// or grpc:// "
        "[default: $HYQ_STORAGE, which no other user of the host can read].",
        show_default=False,
    ),
]
SharedFolder = Annotated[
    Path | None,
    typer.Option("--shared", help="Folder through which hosts share calibrated inputs and the like."),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        metavar="URI",
        envvar="MLFLOW_TRACKING_URI",
        help="MLflow server of the study [default: the store's own database].",
        show_default=False,
        show_envvar=False,
    ),
]
