"""The command line `hyq-search`: which commands there are, and what becomes of errors.

    0    done
    1    a known error, in one line on stderr
    2    usage: unknown command, option or value
    3    export, verify or doctor found problems, certify gave no PASS, trial --from found other scores
    130  interrupted by a signal: started again, the command goes on

Commands import what they need when they run, so that `hyq-search --help` answers at once.
"""

import errno
import os
import sys

import typer

from search.commands import (
    certificates,
    checkpoints,
    cleaning,
    explaining,
    exports,
    planning,
    profiling,
    scores,
    sensitivity,
    service,
    studies,
    workers,
)
from search.concealment import conceal_passwords
from search.console import INTERRUPTED, one_line, remark
from search.install import check_installation

app = typer.Typer(
    name="hyq-search",
    help="Which quantization of HunyuanVideo may I ship? Search, look, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    studies.run,
    studies.status,
    studies.front,
    studies.show,
    studies.trial,
    workers.worker,
    workers.storage_proxy,
    explaining.explain,
    exports.export,
    exports.verify,
    exports.render,
    certificates.certify,
    checkpoints.calibrate,
    checkpoints.quantize_checkpoint,
    planning.plan,
    profiling.profile,
    sensitivity.sensitivity,
    scores.metrics,
    service.ui,
    service.doctor,
    cleaning.gc,
):
    app.command()(command)


def main() -> None:
    """Run the command line; the entry point of the console script. What it writes is not for all the world to read."""
    conceal_passwords()
    os.umask(os.umask(0o027) | 0o027)
    sys.exit(exit_code_of(sys.argv[1:]))


def exit_code_of(arguments: list[str]) -> int:
    """Run one command line and return its exit code; a known error becomes one line on stderr."""
    try:
        check_installation()
        app(arguments, prog_name="hyq-search")
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else int(finished.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except known_errors() as error:
        remark(f"hyq-search: {one_line(str(error))}")
        return 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename)
        remark(f"hyq-search: a path must be short enough for its file system, but got {name[:40]}...; shorten it")
        return 1
    return 0


def known_errors() -> tuple[type[Exception], ...]:
    """Return the error families that our packages raise on purpose.

    Asks the modules that are loaded, because importing hyquant would cost every `--help` a second: what was never
    imported cannot have raised.
    """
    families = (("search.errors", "SearchError"), ("hyquant.errors", "HyquantError"), ("metrics.errors", "MetricError"))
    return tuple(getattr(sys.modules[module], name) for module, name in families if module in sys.modules)
