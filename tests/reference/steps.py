"""The step index and the policy, both told to the engine from outside: an export holds neither."""

import json
from collections.abc import Collection
from pathlib import Path

from tests.reference.files import ParametersInvalid


class Steps:
    """The current step, how many rows the tables have, and which steps are static; every other step is dynamic."""

    def __init__(self, static_steps: Collection[int] = ()) -> None:
        self.index: int | None = None
        self.largest: int | None = None
        self.static_steps = static_steps

    def set(self, index: int) -> None:
        """Move to a step. The index may equal the number of rows here, as in the engine, and fails in the table."""
        if self.largest is not None and index > self.largest:
            raise ParametersInvalid(f"max timestep set in quant weight: {self.largest}")
        self.index = index

    @property
    def is_static(self) -> bool:
        return self.index in self.static_steps


def static_steps(folder: Path) -> range:
    """Return the steps that an export's manifest recommends to run statically: [first, last) in `static_steps`."""
    found = json.loads((folder / "hyq_manifest.json").read_text())["static_steps"]
    return range(*found) if found else range(0)
