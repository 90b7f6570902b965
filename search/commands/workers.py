"""Commands for many machines: worker (join a study from any host) and storage-proxy (share a database)."""

import sys
from typing import Annotated

import typer

from search.commands.options import AsJson, Kernel, SharedFolder, Storage, Store, Study, TrackingUri
from search.console import INTERRUPTED, print_json, print_line, remark
from search.progress import RunProgress


def worker(
    study: Study,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    shared: SharedFolder = None,
    store: Store = None,
    slots: Annotated[
        str | None,
        typer.Option(
            help="Slots of this host, which get devices of their own [default: one rank on whatever is visible].",
            metavar="N x RANKS",
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Leave after so many trials of each slot [default: when the study is over].")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Leave after one trial of each slot.")] = False,
    now: Annotated[
        bool, typer.Option("--now", help="Let the first signal hand trials back, and not the second.")
    ] = False,
    kernel: Kernel = None,
    as_json: AsJson = False,
) -> None:
    """Join a study that is under way, from any host, and leave cleanly on Ctrl-C or SIGTERM."""
    from search.joining import join_study, slots_of
    from search.kernels import force_kernel
    from search.locate import DEFAULT_STORE, locate_study, quiet_optuna

    quiet_optuna()
    ref = locate_study(study, store, storage)
    if kernel is not None:
        force_kernel(kernel, "auto" if ref.config is None else ref.config.model.device)
    with RunProgress(sys.stderr if as_json else sys.stdout) as progress:
        summary = join_study(
            ref.config or ref.name,
            store=ref.store or DEFAULT_STORE,
            url=ref.url,
            tracking=tracking_uri,
            shared=shared,
            study_file=ref.file,
            slots=slots_of(slots),
            max_trials=1 if once else trials,
            is_hasty=now,
            on_event=progress,
        )
    if as_json:
        print_json({"study": summary.study, "message": summary.message, "trials": summary.counts})
    else:
        counts = ", ".join(f"{count} {state}" for state, count in summary.counts.items() if count)
        print_line(f"{summary.study}: {summary.message}; {counts}")
    if summary.was_asked_to_leave:
        raise typer.Exit(INTERRUPTED)


def storage_proxy(
    storage: Storage = None,
    store: Store = None,
    host: Annotated[str, typer.Option(help="Address to listen at; there is no password, so keep it private.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 13000,
) -> None:
    """Let many workers share one database through this process: they give --storage grpc://HOST:PORT."""
    import os

    from search.databases import open_database
    from search.locate import DEFAULT_STORE, STORAGE_VARIABLE, quiet_optuna
    from search.patience import Patience
    from search.proxy import address, serve
    from search.storage import store_errors

    quiet_optuna()
    folder = store or DEFAULT_STORE
    with store_errors(folder):
        url = storage or os.environ.get(STORAGE_VARIABLE)
        server = serve(open_database(folder, create=False, url=url, patience=Patience()), host, port)
    remark(f"proxy at grpc://{address(host, port)} (Ctrl-C ends it)")
    server.wait_for_termination()
