"""Draw what a run held over time."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tools.soak.sample import WATCHED, Sample


def plot(samples: Sequence[Sample], warmup_s: float, path: Path) -> None:
    """Write a PNG with resident memory, handles and threads by role, and disk by part, over minutes."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasAgg(figure)
    memory, handles, disk = figure.subplots(3, 1, sharex=True)
    for role in WATCHED:
        there = [(sample.at_s / 60, sample.roles[role]) for sample in samples if role in sample.roles]
        minutes = [at for at, _ in there]
        memory.plot(minutes, [held.rss_bytes / 2**20 for _, held in there], label=role)
        handles.plot(minutes, [held.handles for _, held in there], label=f"{role}, handles")
        handles.plot(minutes, [held.threads for _, held in there], linestyle=":", label=f"{role}, threads")
    disk.set_prop_cycle(color=colormaps["tab20"].colors)
    for part in samples[-1].disk_bytes:
        sizes = [sample.disk_bytes.get(part, 0) / 2**20 for sample in samples]
        disk.plot([sample.at_s / 60 for sample in samples], sizes, label=part)
    for axes, name in ((memory, "resident MiB"), (handles, "open handles, threads"), (disk, "MiB on disk")):
        axes.axvline(warmup_s / 60, color="gray", linewidth=0.8)
        axes.set_ylabel(name)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    disk.set_xlabel("minutes")
    figure.savefig(path, dpi=100)
