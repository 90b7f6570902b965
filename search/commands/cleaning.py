"""The command gc: what a study's policy lets go."""

from typing import Annotated

import typer

from search.commands.options import AsJson, Storage, Store, Study, TrackingUri
from search.console import print_json, print_line, remark


def gc(
    study: Study,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; else it is only listed.")] = False,
    store: Store = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """List, or with --yes remove, what the study's `artifacts:` does not keep."""
    from search.artifacts import apply, removals, shortfall
    from search.locate import config_to_run, locate_study, opened_study

    ref = locate_study(study, store, storage)
    config, _ = config_to_run(ref)
    server = tracking_uri or config.tracking
    with opened_study(ref) as opened:
        chosen = removals(ref.store, opened, config.artifacts, is_server=server is not None)
        freed = apply(ref.store, ref.name, chosen) if yes else 0
    if sentence := shortfall(ref.store, config.artifacts, () if yes else chosen):
        remark(sentence)
    if as_json:
        listed = [{"paths": list(map(str, one.paths)), "size_bytes": one.size_bytes, "why": one.why} for one in chosen]
        print_json({"study": ref.name, "removals": listed, "freed_bytes": freed})
        return
    for one in chosen:
        print_line(f"{one.size_bytes / 1e6:9.1f} MB  {', '.join(map(str, one.paths))}: {one.why}")
    if not chosen:
        print_line("nothing to remove")
        return
    total_mb = sum(one.size_bytes for one in chosen) / 1e6
    print_line(f"removed {freed / 1e6:.1f} MB" if yes else f"{total_mb:.1f} MB could go; --yes removes it")
    if server is not None:
        remark("the artifacts of an MLflow server are the server's to remove; only the cache was looked at")
