"""Commands that run a study or answer questions about it: run, trial, status, front, show."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from search.commands.options import AsJson, Kernel, SharedFolder, Storage, Store, Study, TrackingUri
from search.console import print_json, print_line, print_table, remark
from search.errors import SearchError
from search.progress import RunProgress, in_words
from search.redaction import redacted


def run(
    study: Study,
    store: Store = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    shared: SharedFolder = None,
    kernel: Kernel = None,
    as_json: AsJson = False,
) -> None:
    """Create a study, or resume it, and evaluate trials until its budget is used."""
    from search.answers import status_json
    from search.kernels import force_kernel
    from search.locate import config_to_run, locate_study, overview_of
    from search.runner import run_study

    ref = locate_study(study, store, storage)
    config, study_file = config_to_run(ref)
    given = {"tracking": tracking_uri, "shared": None if shared is None else str(shared)}
    config = config.model_copy(update={name: value for name, value in given.items() if value is not None})
    force_kernel(kernel, config.model.device)
    with RunProgress(sys.stderr if as_json else sys.stdout) as progress:
        summary = run_study(config, study_file=study_file, on_event=progress)
    if as_json:
        print_json({**status_json(overview_of(ref)), "message": summary.message})
        return
    counts = ", ".join(f"{count} {state}" for state, count in summary.counts.items() if count)
    print_line(f"{summary.study}: {summary.message}; {counts}; {summary.front_size} on the front")
    print_line(f"next: {next_commands(study, store, storage, has_pages=config.tracking is None)}")


def next_commands(study: str, store: Path | None, storage: str | None, *, has_pages: bool) -> str:
    """Return what to type after a run that had these options; a password in the address is three stars.

    Args:
        study: As the user wrote it.
        store: As given.
        storage: As given.
        has_pages: Whether the store has MLflow's database, which `ui` shows.
    """
    in_store = [study] if store is None else [study, "--store", str(store)]
    found = in_store if storage is None else [*in_store, "--storage", redacted(storage)]
    commands = [
        ["front", *found],
        *([["ui", *in_store]] if has_pages else []),
        ["export", *found, "--pick", "balanced", "--out", "DIR"],
    ]
    return "; ".join(shlex.join(["hyq-search", *command]) for command in commands)


def trial(
    study: Annotated[
        str, typer.Argument(metavar="STUDY", help="Path of a study file, or a name; with --from, number of the trial.")
    ],
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="A quantization config, written by hand.")
    ] = None,
    from_study: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STUDY", help="Run a trial of this study again, and compare; exit code 3 if not equal."
        ),
    ] = None,
    store: Store = None,
    storage: Storage = None,
    kernel: Kernel = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate one hand-written config as a trial of the study, or with --from STUDY TRIAL run a trial again."""
    if from_study is not None:
        _run_again(from_study, study, config, store, storage, kernel, as_json)
        return
    if config is None:
        raise SearchError("trial needs CONFIG.yaml, or --from STUDY TRIAL, but got neither; add one")
    from search.config_file import load_config
    from search.kernels import force_kernel
    from search.locate import config_to_run, locate_study, overview_of
    from search.runner import run_point

    point = load_config(config)
    ref = locate_study(study, store, storage)
    study_config, study_file = config_to_run(ref)
    force_kernel(kernel, study_config.model.device)
    with RunProgress(sys.stderr if as_json else sys.stdout) as progress:
        number = run_point(study_config, point, study_file=study_file, on_event=progress)
    row = overview_of(ref).row(number)
    if row is None or row.state in ("failed", "stopped"):
        raise SearchError(f"trial {number} must finish, but {row.reason if row else 'is gone'}; see hyq-search show")
    _show(study, number, store, storage, as_json)


def _run_again(
    study: str,
    number: str,
    config: Path | None,
    store: Path | None,
    storage: str | None,
    kernel: str | None,
    as_json: bool,
) -> None:
    """Run a stored trial again; exit code 3 says that its scores do not agree."""
    if config is not None or not number.isdecimal():
        raise SearchError(f"trial --from STUDY takes the number of a trial and no config, but got {number!r}; give one")
    from search.answers import rerun_json, rerun_lines
    from search.kernels import force_kernel
    from search.locate import config_to_run, locate_study
    from search.rerun import run_again

    ref = locate_study(study, store, storage)
    force_kernel(kernel, config_to_run(ref)[0].model.device)
    rerun = run_again(ref, int(number))
    if as_json:
        print_json(rerun_json(rerun))
    else:
        for line in rerun_lines(rerun):
            print_line(line)
    if not rerun.agrees:
        raise typer.Exit(3)


def status(study: Study, store: Store = None, storage: Storage = None, as_json: AsJson = False) -> None:
    """Say how far a study is."""
    from search.answers import devices_note, floor_lines, status_json
    from search.locate import locate_study, overview_of
    from search.room import run_shortage

    ref = locate_study(study, store, storage)
    overview = overview_of(ref)
    answer = status_json(overview)
    if as_json:
        print_json(answer)
        return
    counts = ", ".join(f"{count} {state}" for state, count in answer["trials"].items() if count) or "no trials yet"
    print_line(f"study {answer['study']}: {answer['evaluated']} of {answer['budget']['trials']} trials evaluated")
    print_line(f"trials: {counts}")
    picks = ", ".join(f"{name} is trial {number}" for name, number in answer["picks"].items())
    print_line(f"front: {answer['front_size']} points" + (f"; {picks}" if picks else ""))
    if note := devices_note(overview):
        print_line(note)
    for line in floor_lines(overview.floor) if overview.floor is not None else ():
        print_line(line)
    if overview.config.sampler.kind == "auto":
        print_line(f"sampler: {answer['sampler']}, which auto takes for this space and budget")
    if answer["measurement_errors"]:
        numbers = ", ".join(map(str, answer["measurement_errors"]))
        print_line(f"measurement errors: trials {numbers} gain more than their ceiling; see hyq-search show")
    if answer["median_trial_s"] is not None:
        print_line(f"one trial takes {in_words(answer['median_trial_s'])}")
    if ref.store.is_dir() and (short := run_shortage(overview.config, ref.store, answer["evaluated"])):
        print_line(f"room: {short}")


def front(study: Study, store: Store = None, storage: Storage = None, as_json: AsJson = False) -> None:
    """List the trials that no other trial beats, best quality first."""
    from search.answers import devices_note, front_json, table_row
    from search.locate import locate_study, overview_of

    overview = overview_of(locate_study(study, store, storage))
    if as_json:
        print_json(front_json(overview))
    elif overview.front:
        print_table([table_row(row, overview.config.space) for row in overview.front])
        if note := devices_note(overview):
            print_line(note)
    else:
        remark(f"study {overview.config.name} has no complete trial yet")


def show(
    study: Study,
    trial: Annotated[int, typer.Argument(metavar="TRIAL", help="Number of the trial.")],
    store: Store = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Show everything about one trial."""
    _show(study, trial, store, storage, as_json)


def _show(study: str, number: int, store: Path | None, storage: str | None, as_json: bool) -> None:
    from search.answers import trial_json, trial_lines
    from search.locate import locate_study, overview_of

    overview = overview_of(locate_study(study, store, storage))
    row = overview.row(number)
    if row is None:
        known = f"0 to {len(overview.rows) - 1}" if overview.rows else "none yet"
        raise SearchError(f"study {overview.config.name} has trials {known}, but got {number}; see hyq-search status")
    if as_json:
        print_json(trial_json(row))
        return
    for line in trial_lines(row, overview.floor):
        print_line(line)
