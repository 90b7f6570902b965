"""Time int8 Linears against float ones, against those of other libraries, and against the bare integer product.

    python -m tools.bench.linears [--set bars|mini|13b] [--rounds 9] [--json FILE]

Peers come with `pip install -e '.[bench]'`. Every candidate of a row works on the same float32 rows (bfloat16 ones
where it says so) and all take turns in every round; a number is a ratio of medians over the rounds. `bare` is the
integer product alone, on codes that are there already: the best of `torch._int_mm` and oneDNN's qlinear with a packed
weight (which also dequantizes). Compiled peers are compiled as `torch.compile` does by default.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyquant.config import W8A8Dynamic, W8A8Static
from hyquant.kernels.int_mm import cpu_int_mm
from hyquant.modules.linear import quant_linears
from hyquant.numerics.qparams import choose_qparams
from hyquant.schemes import SCHEMES
from hyquant.timing import median_seconds
from tools.bench.tables import markdown, write_json

Shape = tuple[int, int, int]
"""Tokens, input channels, output channels."""

_MINI = {"qkv": (256, 768), "proj": (256, 256), "fc1": (256, 1024), "fc2": (1024, 256), "linear1": (256, 1792)}
_FULL = {"qkv": (3072, 9216), "proj": (3072, 3072), "fc1": (3072, 12288), "fc2": (12288, 3072)}
_FULL |= {"linear1": (3072, 21504), "linear2": (15360, 3072)}

SETS: Mapping[str, Mapping[str, Shape]] = {
    "bars": {
        f"{tokens} x {inputs} -> {outputs}": (tokens, inputs, outputs)
        for tokens, inputs, outputs in (
            (1024, 768, 3072),
            (2048, 1024, 1024),
            (4096, 1024, 4096),
            (1024, 3072, 768),
            (1024, 3072, 3072),
        )
    },
    "mini": {f"mini {kind}, {rows}": (rows, *size) for kind, size in _MINI.items() for rows in (256, 1024)},
    "13b": {f"13B {kind}, {rows}": (rows, *size) for kind, size in _FULL.items() for rows in (256, 1024, 4096)},
}

LEAST_S = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", choices=sorted(SETS), help="default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.set or SETS:
        for label, shape in SETS[name].items():
            rows.append({"set": name, "Linear": label, **measured(shape, args.rounds)})
            print(rows[-1], file=sys.stderr, flush=True)
            torch.compiler.reset()
    summary = means(rows)
    print(markdown(rows))
    print()
    print(markdown(summary))
    if args.json:
        write_json(args.json, rows, rounds=args.rounds, summary=summary)


def measured(shape: Shape, rounds: int) -> dict[str, Any]:
    """Return one row: ratios first, then milliseconds."""
    seconds = median_seconds(candidates(shape), perf_counter, rounds, least_s=LEAST_S)
    ours, bare = seconds["dynamic"], min(seconds[name] for name in ("int_mm", "qlinear"))
    ratios = {
        "vs float32": seconds["float32"] / ours,
        "vs bfloat16": seconds["bfloat16"] / seconds["dynamic bfloat16"],
        "of bare": bare / ours,
        "static vs dynamic": ours / seconds["static"],
        **{f"vs {name}": seconds[name] / ours for name in PEERS if name in seconds},
    }
    return {name: round(ratio, 2) for name, ratio in ratios.items()} | {
        f"{name} ms": float(f"{1000 * value:.3g}") for name, value in seconds.items()
    }


def candidates(shape: Shape) -> dict[str, Callable[[], object]]:
    tokens, inputs, outputs = shape
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    x = torch.randn(tokens, inputs)
    half = nn.Linear(inputs, outputs).bfloat16().requires_grad_(False)
    half_x = x.bfloat16()
    dynamic, static = quantized(linear, x, W8A8Dynamic().kind), quantized(linear, x, W8A8Static().kind)
    codes, weight = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((tokens, inputs), (outputs, inputs)))
    calls: dict[str, Callable[[], object]] = {
        "dynamic": lambda: dynamic(x),
        "static": lambda: static(x),
        "dynamic bfloat16": lambda: dynamic(half_x),
        "float32": lambda: F.linear(x, linear.weight, linear.bias),
        "bfloat16": lambda: F.linear(half_x, half.weight, half.bias),
        "int_mm": lambda: cpu_int_mm(codes, weight, outputs),
        "qlinear": qlinear(codes, weight),
    }
    for name, build in PEERS.items():
        try:
            peer = build(linear, x)
        except ImportError as error:
            print(f"{name} is left out: {error}; pip install -e '.[bench]'", file=sys.stderr)
            continue
        calls[name] = lambda peer=peer: peer(x)  # type: ignore[misc]
    return calls


def quantized(linear: nn.Linear, x: Tensor, kind: str) -> nn.Module:
    """Return what this library makes of a Linear."""
    scheme = SCHEMES[kind]
    lo, hi = x.amin().reshape(1), x.amax().reshape(1)
    qparams = choose_qparams(lo, hi, symmetric=False, deploy_dtype="bfloat16") if scheme.needs_range else None
    (module,) = quant_linears([scheme.build(linear.weight, linear.bias, qparams, "bfloat16")], scheme=kind)
    return module


def qlinear(codes: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Return oneDNN's Linear of uint8 rows, zero point 128, and a packed int8 weight with a scale per channel."""
    packed = torch.ops.onednn.qlinear_prepack(weight.t().contiguous().t(), None)
    rows = (codes.to(torch.int16) + 128).to(torch.uint8)
    scales, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    rest = (None, 1.0, 0, torch.float32, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(rows, 1.0, 128, packed, scales, zeros, *rest)


def torchao_eager(linear: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features)).requires_grad_(False)
    model[0].load_state_dict(linear.state_dict())
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def torchao_compiled(linear: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.compile(torchao_eager(linear, x))


def quanto(linear: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features)).requires_grad_(False)
    model[0].load_state_dict(linear.state_dict())
    quantize(model, weights=qint8, activations=qint8)
    with Calibration():
        model(x)
    freeze(model)
    return model


PEERS: Mapping[str, Callable[[nn.Linear, Tensor], Callable[[Tensor], Tensor]]] = {
    "torchao": torchao_eager,
    "torchao compiled": torchao_compiled,
    "quanto": quanto,
}


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return geometric mean and least of every ratio, per set."""
    found = []
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        ratios = [column for column in own[0] if column.startswith(("vs ", "of ", "static vs"))]
        for what, reduce in (("geometric mean", geometric_mean), ("least", min)):
            values = {column: round(reduce([row[column] for row in own if column in row]), 2) for column in ratios}
            found.append({"set": name, "of all rows": what, **values})
    return found


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
