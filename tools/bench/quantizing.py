"""Quantize a seeded HunyuanVideo of 315 million weights with this library and with msModelSlim: time and memory.

    python -m tools.bench.quantizing --peer /path/to/python --json docs/benchmarks/quantizing.json

`--peer` is a Python that has msmodelslim==26.1.0, torch, diffusers and safetensors; the default is this one. Model:
Tencent's layout, hidden size 1024, 8 heads, 4 double and 8 single blocks, float32; 6 records of 288 tokens. Each run is
a process of its own that calls `quant_model` once, by the same script with other imports; saving is part of it. Runs of
both sides alternate. Memory is the peak of resident memory minus what was resident after the imports, so it counts the
float weights themselves.

Before each run as much memory is touched and freed as a run needs: a virtual machine gets memory from its host at first
use, at half a gigabyte per second on the machine this was written on, and whoever runs first would pay for it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tools.bench.tables import markdown, write_json

CASES = ("w8a8_dynamic", "w8a8", "w8a8_timestep", "m4+w8a8_dynamic", "m6+w8a8_dynamic", "m6_search+w8a8_dynamic")
_TOUCHED_BYTES = 8 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=sys.executable, help="Python that has msmodelslim, or '' to leave it out")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-rounds", type=int, help="fewer for the peer, which takes minutes; default: as --rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in args.case or CASES:
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
        for index in range(args.rounds):
            runs["ours"].append(run_side(sys.executable, "ours", case))
            if args.peer and index < (args.peer_rounds or args.rounds):
                runs["peer"].append(run_side(args.peer, "peer", case))
        rows.append(summary(case, runs))
        print(rows[-1], file=sys.stderr, flush=True)
    print(markdown(rows))
    if args.json:
        write_json(args.json, rows)


def run_side(python: str, side: str, case: str) -> dict[str, float]:
    """Run one side once and return its seconds, resident bytes and the bytes of the float weights."""
    np.ones(_TOUCHED_BYTES // 8)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o700)
        command = [python, "-m", "tools.bench.quantizing_side", side, case, folder]
        here = str(Path(__file__).resolve().parents[2])
        environ = {**os.environ, "PYTHONPATH": here, "MINDIE_LOG_TO_FILE": "0"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode != 0:
            raise SystemExit(f"{side} failed in {case}:\n{done.stderr[-4000:]}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found


def summary(case: str, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return one row: ratio of medians first, then what it is a ratio of."""
    ours, peer = runs["ours"], runs["peer"]
    seconds = median(run["seconds"] for run in ours)
    float_bytes = ours[0]["float_bytes"]

    def grown(side: list[dict[str, float]]) -> float:
        return median(run["peak_bytes"] - run["imported_bytes"] for run in side)

    row = {"case": case}
    if peer:
        row |= {"time ours/peer": round(seconds / median(run["seconds"] for run in peer), 3)}
    row |= {"memory ours/float": round(grown(ours) / float_bytes, 2)}
    if peer:
        row |= {"memory peer/float": round(grown(peer) / float_bytes, 2)}
    row |= {"ours s": round(seconds, 2), "rounds": len(ours)}
    if peer:
        row |= {"peer s": round(median(run["seconds"] for run in peer), 1), "peer rounds": len(peer)}
    return row


if __name__ == "__main__":
    main()
