"""Fuzz a reader for some minutes of computing: `python -m tools.fuzz TARGET --minutes 30`; exit 1 if it found anything.

Every input that breaks the rule of `tools.fuzz.oracle` is written into the corpus folder, and its place is reported
once. Without atheris (no wheel for the platform) the targets of bytes cannot run; those of documents can.
"""

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path


def _followed() -> AbstractContextManager[object]:
    """Let atheris follow the coverage of what is imported inside, if it is installed."""
    try:
        import atheris
    except ImportError:
        return nullcontext()
    packages: AbstractContextManager[object] = atheris.instrument_imports(
        include=["hyquant", "search", "spaces", "yaml"]
    )
    return packages


def main() -> None:
    """Fuzz one target in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="a name, or `list`")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the processor, not of the clock")
    parser.add_argument(
        "--corpus", type=Path, default=Path("/tmp/fuzz"), help="inputs and findings [default: /tmp/fuzz]"
    )
    parser.add_argument("--replay", type=Path, help="judge this one file instead")
    args = parser.parse_args()
    with _followed() if args.target.endswith("-bytes") else nullcontext():
        from tools.fuzz.drive import fuzz_bytes, fuzz_trees, replay
        from tools.fuzz.targets import BYTES, TREES

    if args.target == "list":
        print("\n".join(sorted((*BYTES, *TREES))))
        return
    (args.corpus / "findings").mkdir(parents=True, exist_ok=True)
    from tools.fuzz.tally import Tally

    tally = Tally(args.target, args.corpus, 60 * args.minutes)
    if args.replay is not None:
        sys.exit(replay(tally, args.replay))
    (fuzz_trees if args.target in TREES else fuzz_bytes)(tally)
    sys.exit(tally.report())


if __name__ == "__main__":
    main()
