"""A tiny model that fails or waits on command: an installed plugin, as any other package may bring one.

What it does stands in `faults.json` beside it, a list of objects that each strike when a quantized denoiser renders,
"refuse" when the model is loaded:

    {"what": "oom" | "full" | "hang" | "hold" | "kill" | "stop" | "bug" | "denied" | "refuse", "rank": 0,
     "scheme": "w8a8_static", "skip": 0, "times": 1, "after_s": 0}

`scheme` limits a fault to configs of one linear scheme; `skip` is how many renderings it lets pass first, and `times`
how many it strikes, over all processes; `after_s` is how long the rank lets the others go ahead. "hang" goes on until
the process is ended, "hold" until the fault is taken off the list; measurements of other slots pass meanwhile.
"""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hyquant.errors import ConfigError
from hyquant.models.tiny import TinyVideoModel
from hyquant.modules.swap import swapped

FAULTY = {"kind": "faulty", "source": "0", "device": "cpu"}
"""The `model` of a study."""


@dataclass(frozen=True)
class Faults:
    """The faults of the model that is installed in a folder, as a test sets and sees them."""

    folder: Path

    def set(self, *faults: Mapping[str, Any]) -> None:
        """Let these faults strike from now on, and no others; a fault's strikes are counted by its place among them."""
        draft = self.folder / "draft.json"
        draft.write_text(json.dumps(faults))
        draft.replace(self.folder / "faults.json")

    def listed(self) -> list[dict[str, Any]]:
        """Return the faults that strike now."""
        return json.loads((self.folder / "faults.json").read_text())

    def has_struck(self, place: int = 0) -> bool:
        """Say whether the fault at a place of the list has struck."""
        return self._mark(place, 0).exists()

    def is_due(self, place: int, fault: Mapping[str, Any]) -> bool:
        """Count one rendering, and say whether the fault strikes in it."""
        for count in range(-fault.get("skip", 0), fault.get("times", 1)):
            try:
                os.close(os.open(self._mark(place, count), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return count >= 0
        return False

    def _mark(self, place: int, count: int) -> Path:
        return self.folder / f"struck-{place}-{count}"


class FaultyModel(TinyVideoModel):
    def render(self, *args: Any, on_step: Callable[[], None] | None = None, **kwargs: Any) -> list[torch.Tensor]:
        state, faults = swapped(self.denoiser), Faults(Path(__file__).parent)
        if state is not None:
            schemes = {linear.scheme for linear in state.quantized.values()}
            for place, fault in enumerate(faults.listed()):
                is_meant = fault["what"] != "refuse" and fault.get("rank", 0) == int(os.environ.get("RANK", "0"))
                if is_meant and fault.get("scheme") in (None, *schemes) and faults.is_due(place, fault):
                    time.sleep(fault.get("after_s", 0))
                    _strike(fault["what"])
                    while fault["what"] == "hold" and fault in faults.listed():
                        if on_step is not None:
                            on_step()
                        time.sleep(0.05)
        return super().render(*args, on_step=on_step, **kwargs)


def _strike(what: str) -> None:
    if what == "oom":
        raise torch.OutOfMemoryError("tried to allocate 80.00 GiB")
    if what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/full/disk")
    if what == "bug":
        raise ZeroDivisionError("a bug of one rank")
    if what == "denied":
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/folder")
    if what == "hang":
        time.sleep(3600)
    if what in ("kill", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])


def load(source: str, *, device: torch.device, dtype: torch.dtype) -> FaultyModel:
    own = {"what": "refuse", "rank": int(os.environ.get("RANK", "0"))}
    if own in Faults(Path(__file__).parent).listed():
        raise ConfigError("a faulty model must be loaded by another rank, but this one was asked; ask another")
    return FaultyModel(int(source), device=device, dtype=dtype)


def install(folder: Path) -> Faults:
    """Make a distribution of this module in a folder that is to be put on the path; it has no faults yet."""
    (folder / "faulty_model.py").write_text(Path(__file__).read_text())
    info = folder / "faulty_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-model\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hyq.models]\nfaulty = faulty_model:load\n")
    faults = Faults(folder)
    faults.set()
    return faults
