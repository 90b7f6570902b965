"""The command about certificates: certify."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands.exports import Export
from search.commands.options import AsJson, Kernel, Storage, Store
from search.console import print_json, print_line, print_table, remark

if TYPE_CHECKING:
    from search.margin_verdicts import MetricVerdict
    from search.moves import Move

_PROGRESS_S = 5.0


def certify(
    export: Export,
    study: Annotated[
        str | None, typer.Option(metavar="STUDY", help="Study file whose section `certificate` states the margins.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Repeat the certificate that is there on the present software.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a certificate that is there.")] = False,
    kernel: Kernel = None,
    store: Store = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Judge an export on held-out prompts against stated margins; exit code 3 unless it passes."""
    from search.errors import SearchError

    if again:
        _repeat(export, study, store, storage, kernel, as_json)
        return
    if study is None:
        raise SearchError("an export is certified by a study's margins, but none was named; give --study STUDY")
    _certify(export, study, store, storage, kernel, overwrite, as_json)


def _certify(
    export: Path,
    study: str,
    store: Path | None,
    storage: str | None,
    kernel: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    from hyquant.calibration.store import write_atomically
    from hyquant.export.names import CERTIFICATE_PAGE_NAME
    from search.certificate import write_certificate
    from search.certificate_page import certificate_page
    from search.certifying import certify_export
    from search.clip_space import writing_to
    from search.heldout import certificate_to_judge
    from search.kernels import force_kernel

    if not overwrite:
        _require_uncertified(export)
    config, section, heldout = certificate_to_judge(study, store, storage)
    force_kernel(kernel, config.model.device)
    remark(f"rendering {len(heldout)} prompts x {section.seeds_per_prompt} seeds, in float and quantized")
    certificate = certify_export(config, section, heldout, export, on_progress=_Patient())
    if not overwrite:
        _require_uncertified(export)  # another process may have been faster
    page = export / CERTIFICATE_PAGE_NAME
    with writing_to(export):
        path = write_certificate(export, certificate)
        write_atomically(page, certificate_page(certificate).encode())
    if as_json:
        print_json(certificate.model_dump(mode="json"))
    else:
        print_line(f"{export}: {certificate.headline()}")
        print_table([_row(metric) for metric in certificate.metrics])
        print_line(f"wrote {path} and {page}")
    if certificate.verdict != "PASS":
        raise typer.Exit(3)


def _require_uncertified(export: Path) -> None:
    from search.certificate import read_certificate
    from search.errors import SearchError

    old = read_certificate(export)
    if old is not None:
        raise SearchError(
            f"an export is certified once, because a verdict that is asked for again until it suits is none, but "
            f"{export} has one ({old.verdict}, {old.created}); repeat it with --again, or replace it with --overwrite"
        )


def _repeat(
    export: Path, study: str | None, store: Path | None, storage: str | None, kernel: str | None, as_json: bool
) -> None:
    from search.certificate import read_certificate
    from search.errors import SearchError
    from search.kernels import force_kernel
    from search.locate import DEFAULT_STORE, config_to_run, locate_study
    from search.repeating import repeat_certificate

    old = read_certificate(export)
    if old is None:
        raise SearchError(f"--again repeats a certificate, but {export} has none; certify it with --study STUDY")
    device, place = "auto", store or DEFAULT_STORE
    if study is not None:
        config = config_to_run(locate_study(study, store, storage))[0]
        device, place = config.model.device, Path(config.store)
    force_kernel(kernel, device)
    remark(f"rendering {len(old.pairs)} pairs again, in float and quantized")
    found = repeat_certificate(old, export, store=place, device=device, on_progress=_Patient())
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_line(f"{export}: {found.before} on {old.created}, {found.certificate.headline()} today")
        print_table([_move_row(move) for move in found.moves])
        print_line(f"software: {'; '.join(found.changed_software) or 'as it was'}")
    if not found.is_as_before:
        raise typer.Exit(3)


def _row(metric: "MetricVerdict") -> dict[str, str]:
    return {
        "metric": metric.metric,
        "margin": metric.margin.in_words(),
        "float": _number(metric.float_mean),
        "quantized": _number(metric.mean),
        "difference": f"{_number(metric.difference)} ({_number(metric.low)} to {_number(metric.high)})",
        "p": f"{metric.p_adjusted:.2g}",
        "verdict": metric.verdict,
        "reason": metric.reason,
    }


def _move_row(move: "Move") -> dict[str, str]:
    return {
        "metric": move.metric,
        "before": _number(move.before),
        "today": _number(move.after),
        "moved": _number(move.moved),
        "floor": "unknown" if move.floor is None else _number(move.floor),
        "verdict": move.in_words(),
    }


def _number(value: float | None) -> str:
    from search.readable import readable

    return "-" if value is None else readable(value)


class _Patient:
    """Says what is being done, at most every few seconds."""

    def __init__(self) -> None:
        self._next_s = time.monotonic() + _PROGRESS_S

    def __call__(self, text: str) -> None:
        if time.monotonic() >= self._next_s:
            remark(text)
            self._next_s = time.monotonic() + _PROGRESS_S
