"""A program as the ranks of a run: one process each, one thread each, joined by torchrun's environment."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.toys.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(arguments: Sequence[str], *, num_ranks: int = 2, timeout_s: float = 180) -> list[str]:
    """Run Python with these arguments on every rank, and return what each printed; all must end well."""
    shared = os.environ | {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    finished = [process.communicate(timeout=timeout_s) for process in processes]
    for (_, errors), process in zip(finished, processes, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in finished]
