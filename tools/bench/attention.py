"""Time the kernel of int8 attention (`fa3`) against float attention.

    python -m tools.bench.attention [--rounds 9] [--json FILE]

The peer is `scaled_dot_product_attention`, which is fused, in float32 and bfloat16. Beside it stands what can be put
together from torch's operators: q, k and v are quantized with a scale per head, both products are `torch._int_mm` head
by head, the softmax is float and its result quantized to 127 steps; compiled, everything between the products is fused.
All take turns in every round; ratios are of medians, more than 1 means that the kernel is faster.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hyquant.kernels.x86_attention import int8_attention
from hyquant.timing import median_seconds
from tools.bench.linears import LEAST_S
from tools.bench.tables import markdown, write_json

SHAPES = {
    "mini at 32x32x5": (4, 48, 64),
    "mini at 64x64x13": (4, 272, 64),
    "mini at 96x96x13": (4, 592, 64),
    "mini at 192x192x13": (4, 2320, 64),
    "13B, a ninth of 544x960x33": (24, 2296, 128),
}
"""Heads, tokens, head dim."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for label, shape in SHAPES.items():
        rows.append({"attention": label, **measured(shape, args.rounds)})
        print(rows[-1], file=sys.stderr, flush=True)
        torch.compiler.reset()
    print(markdown(rows))
    if args.json:
        write_json(args.json, rows, rounds=args.rounds)


def measured(shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Return one row: ratios first, then milliseconds."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, *shape) for _ in range(3))
    halves = [tensor.bfloat16() for tensor in (q, k, v)]
    compiled = torch.compile(from_torch)
    scale = (q.abs().amax() / 127).expand(shape[0], 1).contiguous()
    scales = {"q_scale": scale, "k_scale": scale, "v_scale": scale}
    by_token, halves_by_token = ([x.transpose(1, 2).contiguous() for x in tensors] for tensors in ((q, k, v), halves))
    calls: dict[str, Callable[[], object]] = {
        "float32": lambda: F.scaled_dot_product_attention(q, k, v),
        "bfloat16": lambda: F.scaled_dot_product_attention(*halves),
        "int8": lambda: int8_attention(*by_token, None, **scales),
        "int8 of bfloat16": lambda: int8_attention(*halves_by_token, None, **scales),
        "int8 from torch": lambda: compiled(q, k, v),
    }
    seconds = median_seconds(calls, perf_counter, rounds, least_s=LEAST_S)
    ratios = {
        "vs float32": seconds["float32"] / seconds["int8"],
        "vs bfloat16": seconds["bfloat16"] / seconds["int8 of bfloat16"],
        "vs int8 from torch": seconds["int8 from torch"] / seconds["int8"],
    }
    return {name: round(ratio, 2) for name, ratio in ratios.items()} | {
        f"{name} ms": float(f"{1000 * value:.3g}") for name, value in seconds.items()
    }


def from_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v of [1, A, S, D] float32, both products of int8 codes."""
    heads = []
    for q_SD, k_SD, v_SD in zip(q[0], k[0], v[0], strict=True):
        q_codes, q_scale = _quantized(q_SD)
        k_codes, k_scale = _quantized(k_SD)
        v_codes, v_scale = _quantized(v_SD)
        scores = torch._int_mm(q_codes, k_codes.t()).float() * (q_scale * k_scale / q.shape[-1] ** 0.5)
        weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        total = weights.sum(dim=-1, keepdim=True)
        product = torch._int_mm((weights * 127).round().to(torch.int8), v_codes)
        heads.append(product.float() * (v_scale / 127) / total)
    return torch.stack(heads)[None]


def _quantized(x_SD: Tensor) -> tuple[Tensor, Tensor]:
    scale = x_SD.abs().amax() / 127
    return (x_SD / scale).round().to(torch.int8), scale


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
