"""A tiny model that fails on command: an installed plugin, as any other package may bring one.

What it does stands in `faults.json` beside it, a list of objects that each strike when a quantized denoiser renders,
"refuse" when the model is loaded:

    {"what": "oom" | "full" | "hang" | "kill" | "stop" | "bug" | "denied" | "refuse", "rank": 0,
     "scheme": "w8a8_static", "times": 1, "after_s": 0}

`scheme` limits a fault to configs of one linear scheme; `times` counts over all processes; `after_s` is how long the
rank lets the others go ahead.
"""

import errno
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hyquant.errors import ConfigError
from hyquant.models.tiny import TinyVideoModel
from hyquant.modules.swap import swapped

_HERE = Path(__file__).parent


class FaultyModel(TinyVideoModel):
    def render(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        state = swapped(self.denoiser)
        if state is not None:
            schemes = {linear.scheme for linear in state.quantized.values()}
            for index, fault in _faults_of_this_rank():
                is_meant = fault["what"] != "refuse" and fault.get("scheme") in (None, *schemes)
                if is_meant and _is_due(index, fault.get("times", 1)):
                    time.sleep(fault.get("after_s", 0))
                    _strike(fault["what"])
        return super().render(*args, **kwargs)


def _faults_of_this_rank() -> Iterator[tuple[int, dict[str, Any]]]:
    for index, fault in enumerate(json.loads((_HERE / "faults.json").read_text())):
        if fault.get("rank", 0) == int(os.environ.get("RANK", "0")):
            yield index, fault


def _is_due(index: int, times: int) -> bool:
    for count in range(times):
        try:
            os.close(os.open(_HERE / f"struck-{index}-{count}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return True
    return False


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
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])


def load(source: str, *, device: torch.device, dtype: torch.dtype) -> FaultyModel:
    if any(fault["what"] == "refuse" for _, fault in _faults_of_this_rank()):
        raise ConfigError("a faulty model must be loaded by another rank, but this one was asked; ask another")
    return FaultyModel(int(source), device=device, dtype=dtype)


def install(folder: Path, faults: Sequence[Mapping[str, Any]]) -> None:
    """Make a distribution of this module in a folder that is to be put on the path."""
    (folder / "faulty_model.py").write_text(Path(__file__).read_text())
    info = folder / "faulty_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-model\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hyq.models]\nfaulty = faulty_model:load\n")
    (folder / "faults.json").write_text(json.dumps(list(faults)))
