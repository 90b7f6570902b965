"""Run the mini study for an hour and say whether it grows: `python -m tools.soak --minutes 60 [--keep DIR]`.

Exit 0 if nothing grows, 1 otherwise. `--keep` keeps the samples (samples.jsonl), the verdict (soak.json, soak.png), the
study file and the run's log; the store itself is removed.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from tools.bench.tables import environment, markdown
from tools.soak.run import soak
from tools.soak.verdict import judged

KEPT = ("samples.jsonl", "soak.json", "soak.png", "soak.yaml", "run.log")


def main() -> None:
    """Run, judge, and write what is to be kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--warmup", type=float, default=10.0, help="first minutes, which are not judged")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between two samples")
    parser.add_argument("--keep", type=Path, help="folder for samples, verdict, picture and log")
    args = parser.parse_args()
    if args.warmup >= args.minutes:
        parser.error(f"--warmup must be shorter than --minutes, but {args.warmup:g} >= {args.minutes:g}")
    with tempfile.TemporaryDirectory(prefix="hyq-soak-") as name:
        folder = Path(name)
        soaked = soak(folder, seconds=60 * args.minutes, interval_s=args.interval)
        verdict = judged(soaked, warmup_s=60 * args.warmup)
        (folder / "soak.json").write_text(
            json.dumps({"environment": environment(), "minutes": args.minutes, **verdict}, indent=1) + "\n"
        )
        if args.keep is not None:
            from tools.soak.plot import plot

            plot(soaked.samples, 60 * args.warmup, folder / "soak.png")
            args.keep.mkdir(parents=True, exist_ok=True)
            for kept in KEPT:
                shutil.copy(folder / kept, args.keep / kept)
    print(markdown(verdict["rows"]))
    print(f"\n{verdict['trials']} trials after the warm-up; {'nothing grows' if verdict['passed'] else 'FAILED'}")
    sys.exit(0 if verdict["passed"] else 1)


if __name__ == "__main__":
    main()
