"""Write docs/benchmarks.md from the JSON files that the benchmarks left in docs/benchmarks.

python -m tools.bench.page
"""

import json
from pathlib import Path
from typing import Any

from tools.bench.tables import markdown

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"

SECTIONS = {
    "linears": (
        "int8 Linears",
        "tools.bench.linears",
        "Ratios of medians, more than 1 is faster. `vs bfloat16` compares bfloat16 inputs on both sides; `of bare` is "
        "how much of the speed of the integer product alone (the best of `torch._int_mm` and oneDNN's qlinear) is "
        "left when quantizing, dequantizing and bias are added. Peers quantize the same Linear: torchao "
        "`Int8DynamicActivationInt8WeightConfig`, eager and compiled, and optimum-quanto with qint8 weights and "
        "activations.",
    ),
    "attention": (
        "Attention on int8 operands",
        "tools.bench.attention",
        "The kernel of `fa3` against `scaled_dot_product_attention`; more than 1 is faster. `int8 from torch` is the "
        "same put together from torch's operators and compiled.",
    ),
    "denoiser": (
        "The mini model's denoiser",
        "tools.bench.recipes studies/mini.yaml",
        "The denoising loop at the deployment shape of `studies/mini.yaml`. The gain of int8 is `speed-up, compiled`: "
        "float and int8 are both compiled; what compiling alone does for float stands beside it and is no part of it.",
    ),
    "quantizing": (
        "Quantizing 315 million weights",
        "tools.bench.quantizing",
        "A seeded HunyuanVideo in Tencent's layout (hidden size 1024, 8 heads, 4 + 8 blocks, float32), quantized and "
        "saved by one script through this library and through msModelSlim, each run in a process of its own. `memory` "
        "is the peak of resident memory minus that after imports, over the bytes of the float weights.",
    ),
    "rank_split": (
        "Ranks: each quantizes all weights, or its share",
        "tools.bench.rank_split --ranks 2",
        "The weights of the model above on ranks of one machine, one thread each: every rank quantizes every weight, "
        "against every rank quantizing its share and sending it to the others over gloo. More than 1: sharing out is "
        "slower.",
    ),
    "streaming": (
        "Quantizing a checkpoint as a stream",
        "tools.bench.streaming --folder DIR",
        "`hyq-search quantize-checkpoint` (w8a8_dynamic) on a synthetic bfloat16 checkpoint of HunyuanVideo's width in "
        "several files, against `cp` and fsync of the same files; the time includes Python's start, and both SHA-256 "
        "digests. Memory is anonymous and shared pages.",
    ),
}


def main() -> None:
    parts = [
        "# Benchmarks",
        "",
        "Written by `make bench`; the numbers are those of the machine that each section names.",
    ]
    for name, (title, command, text) in SECTIONS.items():
        path = FOLDER / f"{name}.json"
        if path.exists():
            parts += ["", f"## {title}", "", f"`python -m {command}`", "", text, "", *section(path)]
    (FOLDER.parent / "benchmarks.md").write_text("\n".join(parts) + "\n")


def section(path: Path) -> list[str]:
    """Return the lines of one benchmark: what it was measured on, its summary if it has one, and its rows."""
    found: dict[str, Any] = json.loads(path.read_text())
    machine = found["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    about = [f"{name} {found[name]}" for name in ("shape", "rounds") if name in found]
    where = [machine["date"], machine["processor"], f"{machine['threads']} threads", machine["instructions"]]
    lines = [
        f"{'; '.join([*where, packages, *about])}. [JSON](benchmarks/{path.name})",
        "",
    ]
    if "summary" in found:
        lines += [markdown(found["summary"]), ""]
    return [*lines, markdown(found["rows"])]


if __name__ == "__main__":
    main()
