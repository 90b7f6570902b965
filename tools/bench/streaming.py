"""Time `hyq-search quantize-checkpoint` on a synthetic HunyuanVideo against copying the same files, and its memory.

    python -m tools.bench.streaming --folder /scratch [--size 4] [--rounds 7] [--json FILE]

The checkpoint has the width of the published model, fewer blocks, diffusers' names, bfloat16, several files and an
index; its weights are seeded noise and are written as they are drawn. Each round copies the files (`cp`, then fsync as
the command does) and quantizes them, in turns, once with the files in the page cache and once without. A run is a
process of its own, so its time includes Python's start and imports. Memory is the largest sum of anonymous and shared
pages seen every 10 ms; mapped pages of files are not counted, as the system takes them back whenever it likes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel

from hyquant.export.tensor_file import TensorFile, size_of
from tools.bench.tables import markdown, write_json

CONFIG = "linear: {kind: w8a8_dynamic}\n"
MAX_RATIO, MAX_PEAK_BYTES = 4.0, 1.5e9
"""The bars: how much longer than copying, and how much memory."""

_SHARD_BYTES = 1e9
_SAMPLE_S = 0.01


@dataclass(frozen=True)
class Row:
    """What was measured in one state of the page cache; times are medians over rounds."""

    cache: str
    rounds: int
    input_bytes: int
    output_bytes: int
    copy_s: float
    quantize_s: float
    ratio: float
    peak_bytes: int


def main() -> None:
    """Print a table, write JSON, and exit with 3 if a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where some multiple of the size is free")
    parser.add_argument("--size", type=float, default=4.0, help="GB of weights, about")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    args = parser.parse_args()
    require_space(args.folder, round(3 * args.size * 1e9))
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="hyq-streaming-") as name:
        folder = Path(name)
        source = folder / "transformer"
        write_checkpoint(source, blocks_for(args.size * 1e9), seed=0)
        (folder / "config.yaml").write_text(CONFIG)
        rows = [measure(folder, source, cache, args.rounds) for cache in ("cold", "warm")]
    shown = [table_row(row) for row in rows]
    print(markdown(shown), flush=True)
    if args.json is not None:
        write_json(args.json, shown)
    if any(row.ratio > MAX_RATIO or row.peak_bytes > MAX_PEAK_BYTES for row in rows):
        sys.exit(3)


def require_space(folder: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        sys.exit(f"the benchmark needs {size_bytes / 1e9:.0f} GB, but {folder} has {free / 1e9:.0f} free")


def blocks_for(size_bytes: float) -> tuple[int, int]:
    """Return how many double and single blocks of the published width make a checkpoint of about some size."""
    bare, one_double, one_single = (_bytes_of(*blocks) for blocks in ((0, 0), (1, 0), (0, 1)))
    double, single = one_double - bare, one_single - bare
    pairs = max(1, round((size_bytes - bare) / (double + 4 * single)))
    return pairs, max(1, round((size_bytes - bare - pairs * double) / single))


def _bytes_of(num_double: int, num_single: int) -> int:
    state = denoiser(num_double, num_single).state_dict()
    return sum(size_of((torch.bfloat16, tuple(tensor.shape))) for tensor in state.values())


def denoiser(num_double: int, num_single: int) -> HunyuanVideoTransformer3DModel:
    with torch.device("meta"):
        return HunyuanVideoTransformer3DModel(num_layers=num_double, num_single_layers=num_single)


def write_checkpoint(folder: Path, blocks: tuple[int, int], *, seed: int) -> None:
    """Write a checkpoint in files of about 1 GB with an index, one tensor in memory at a time."""
    folder.mkdir(parents=True)
    model = denoiser(*blocks)
    model.save_config(folder)
    generator = torch.Generator().manual_seed(seed)
    specs = {name: (torch.bfloat16, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    shards: list[list[str]] = [[]]
    held = 0
    for name, spec in specs.items():
        if shards[-1] and held + size_of(spec) > _SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size_of(spec)
    table: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        table |= dict.fromkeys(names, file_name)
        with TensorFile(folder / file_name, {name: specs[name] for name in names}) as file:
            file.start()
            for name in file.layout.places:
                noise = torch.randn(specs[name][1], generator=generator) * 0.02
                file.put(name, noise.bfloat16())
            file.finish()
    index = {"metadata": {"total_size": sum(map(size_of, specs.values()))}, "weight_map": table}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def measure(folder: Path, source: Path, cache: str, rounds: int) -> Row:
    copies, runs, peaks, output_bytes = [], [], [], 0
    for _ in range(rounds):
        with removed(folder / "copy") as copy:
            copies.append(timed(source, cache, lambda copy=copy: copy_files(source, copy)))
        with removed(folder / "export") as out:
            runs.append(timed(source, cache, lambda out=out: peaks.append(quantize(folder, source, out))))
            output_bytes = sum(file.stat().st_size for file in out.iterdir())
    copy_s, quantize_s = statistics.median(copies), statistics.median(runs)
    return Row(
        cache=cache,
        rounds=rounds,
        input_bytes=sum(file.stat().st_size for file in source.iterdir()),
        output_bytes=output_bytes,
        copy_s=copy_s,
        quantize_s=quantize_s,
        ratio=quantize_s / copy_s,
        peak_bytes=max(peaks),
    )


@contextmanager
def removed(path: Path) -> Iterator[Path]:
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def timed(source: Path, cache: str, run: Callable[[], object]) -> float:
    """Return the seconds of a run that starts with the source in the page cache or without."""
    os.sync()
    for file in source.iterdir():
        with file.open("rb") as opened:
            if cache == "cold":
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cache == "warm" and opened.read(2**24):
                pass
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def copy_files(source: Path, copy: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    for path in (*copy.iterdir(), copy):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def quantize(folder: Path, source: Path, out: Path) -> int:
    """Run the command and return the most memory it had."""
    command = [sys.executable, "-c", "from search.cli import main; main()", "quantize-checkpoint", "--in", str(source)]
    command += ["--out", str(out), "--config", str(folder / "config.yaml")]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, held_bytes(process.pid))
            time.sleep(_SAMPLE_S)
    if process.returncode:
        sys.exit(f"quantize-checkpoint must end with 0, but ended with {process.returncode}")
    return peak


def held_bytes(pid: int) -> int:
    """Return the anonymous and shared memory of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem") if name in fields)


def table_row(row: Row) -> dict[str, object]:
    return {
        "page cache": row.cache,
        "quantize / copy (bar 4)": round(row.ratio, 2),
        "peak GB (bar 1.5)": round(row.peak_bytes / 1e9, 2),
        "in GB": round(row.input_bytes / 1e9, 2),
        "out GB": round(row.output_bytes / 1e9, 2),
        "copy s": round(row.copy_s, 1),
        "quantize s": round(row.quantize_s, 1),
        "rounds": row.rounds,
    }


if __name__ == "__main__":
    main()
