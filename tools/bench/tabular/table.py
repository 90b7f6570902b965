"""The table of the tabular benchmark as frozen values, and its file: JSON lines, the first one about all others."""

import json
import os
from pathlib import Path
from typing import Any

from hyquant.config import FrozenModel, QuantConfig

TABLE = Path(__file__).with_name("table.jsonl")


class About(FrozenModel):
    """What the rows were measured on.

    Attributes:
        layers: Canonical names of the layers that take part, in model order.
        order: Units of layers by measured sensitivity, the most sensitive first.
        prompts: The prompts of each row's scores, in their order.
        environment: Machine, packages and date.
        latency: In words what `Row.ratio` is.
    """

    layers: tuple[str, ...]
    order: tuple[str, ...]
    prompts: tuple[str, ...]
    environment: dict[str, Any]
    latency: str


class Row(FrozenModel):
    """One config.

    Attributes:
        config: Its canonical form, and `digest` of it.
        scores: Values per prompt by metric.
        ratio: Seconds of a denoising loop over those of the float control, both as processor time of one thread.
        step_s: Processor seconds of one step by mode, the control's under "control".
        render_s: Processor seconds to render all prompts.
        trial_s: Processor seconds of everything that a trial does for the config: calibrate, quantize, render, score.
    """

    digest: str
    config: QuantConfig
    scores: dict[str, tuple[float, ...]]
    ratio: float
    step_s: dict[str, float]
    render_s: float
    trial_s: float


class Table(FrozenModel):
    """A complete space."""

    about: About
    rows: tuple[Row, ...]


def read_table(path: Path = TABLE) -> Table:
    """Read a table; a last line that was cut short is left out."""
    first, *lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return Table(about=About.model_validate_json(first), rows=tuple(map(Row.model_validate_json, whole)))


def append_line(path: Path, value: FrozenModel) -> None:
    """Append a value; on return it is on the disk. What a killed process left of a line goes first."""
    path.touch()
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write(json.dumps(value.model_dump(mode="json")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
