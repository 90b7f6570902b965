"""Should ranks share out the layers to quantize, or each quantize them all? Time both on ranks of this machine.

    python -m tools.bench.rank_split --ranks 2 --json docs/benchmarks/rank_split.json

Every rank has the float weights of a 315-million-parameter HunyuanVideo (hidden 1024, 4 double and 8 single blocks), as
ranks of a trial do, and one thread. *All*: each quantizes every weight. *Split*: each quantizes every R-th weight and
sends integers and scales to the others by gloo, the transport of trials on CPUs. Rounds of both alternate; a round
lasts until the slowest rank is done.
"""

import argparse
import os
import socket
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp

from hyquant.schemes.weights import quantize_weight
from tools.bench.tables import markdown, write_json

HIDDEN = 1024
_DOUBLE = ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN))
SHAPES = ((*_DOUBLE, *_DOUBLE) * 4) + ((7 * HIDDEN, HIDDEN), (HIDDEN, 5 * HIDDEN)) * 8

Codes = tuple[Tensor, Tensor]


def main() -> None:
    """Print one line: seconds of both ways and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (args.ranks, args.rounds, port, queue), nprocs=args.ranks)
    rows = [queue.get()]
    print(markdown(rows))
    if args.json:
        write_json(args.json, rows)


def _rank(rank: int, num_ranks: int, rounds: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in SHAPES]
    everything, shared = quantize_all(weights), quantize_split(weights, rank, num_ranks)
    assert all(map(torch.equal, chain(*everything), chain(*shared)))
    del everything, shared
    times: dict[str, list[float]] = {"all": [], "split": []}
    for _ in range(rounds):
        times["all"].append(_seconds(lambda: quantize_all(weights)))
        times["split"].append(_seconds(lambda: quantize_split(weights, rank, num_ranks)))
    if rank == 0:
        all_s, split_s = median(times["all"]), median(times["split"])
        queue.put(
            {
                "ranks": num_ranks,
                "split / all": round(split_s / all_s, 2),
                "all s": round(all_s, 3),
                "split s": round(split_s, 3),
                "exchanged MB": round(sum(weight.numel() for weight in weights) / 1e6),
                "rounds": rounds,
            }
        )
    dist.destroy_process_group()


def quantize_all(weights: list[Tensor]) -> list[Codes]:
    """Return integers and scales of every weight, all worked out here."""
    return [quantize_weight(weight, "float32") for weight in weights]


def quantize_split(weights: list[Tensor], rank: int, num_ranks: int) -> list[Codes]:
    """Return the same, each rank working out every `num_ranks`-th weight and receiving the others."""
    found: list[Codes] = []
    for index, weight in enumerate(weights):
        is_own = index % num_ranks == rank
        found.append(quantize_weight(weight, "float32") if is_own else _empty_codes(weight))
    pending = [
        dist.broadcast(part, src=index % num_ranks, async_op=True)
        for index, codes in enumerate(found)
        for part in codes
    ]
    for work in pending:
        work.wait()
    return found


def _empty_codes(weight: Tensor) -> Codes:
    return torch.empty(weight.shape, dtype=torch.int8), torch.empty(weight.shape[0], 1)


def _seconds(work: Callable[[], object]) -> float:
    dist.barrier()
    started = perf_counter()
    work()
    dist.barrier()
    return perf_counter() - started


if __name__ == "__main__":
    main()
