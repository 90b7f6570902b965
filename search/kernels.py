"""Which int8 kernel runs which Linear here: the table of `hyq-search doctor --kernels`, and a choice forced by hand."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hyquant.devices import resolve_torch_device
from hyquant.kernels import KERNELS
from hyquant.kernels.selection import FORCED, LinearShape, forced_kernel, kernel_for, kernel_times
from hyquant.models import load_model

HIDDEN_SIZES = (256, 3072)
"""Of the shipped mini model and of HunyuanVideo 13B, whose Linears are looked at where no study is named."""


@dataclass(frozen=True)
class KernelTime:
    """How long one kernel takes for one Linear: a call with float32 input, quantized per token.

    Attributes:
        shape: Rows x input channels -> output channels.
        kernel: Key in `KERNELS`.
        kind: "native" or "simulated".
        time_s: Median of one call.
        gops: Integer operations (2 M N K) per nanosecond.
        is_chosen: Whether a quantized layer of this shape gets it.
    """

    shape: str
    kernel: str
    kind: str
    time_s: float
    gops: float
    is_chosen: bool

    def as_json(self) -> dict[str, Any]:
        """Return it for `hyq-search doctor --kernels --json`."""
        return asdict(self)


def force_kernel(name: str | None, device: str) -> None:
    """Make every quantized layer of this process and of those it starts run on one kernel; None leaves the choice.

    Raises:
        ConfigError: If there is no such kernel or it does not run on the device.
    """
    if name is not None:
        os.environ[FORCED] = forced_kernel(name, resolve_torch_device(device)).name


def kernel_table(shapes: Sequence[LinearShape], device: str) -> list[KernelTime]:
    """Return the time of every candidate for every shape; what this machine has not measured yet is measured now."""
    place = resolve_torch_device(device)
    rows: list[KernelTime] = []
    for shape in shapes:
        chosen = kernel_for(place, shape).name
        operations = 2 * shape.num_rows * shape.num_inputs * shape.num_outputs
        rows += [
            KernelTime(str(shape), name, KERNELS[name].kind, time_s, operations / time_s / 1e9, name == chosen)
            for name, time_s in kernel_times(place, shape).items()
        ]
    return rows


def usual_shapes() -> list[LinearShape]:
    """Return the joined Linears of HunyuanVideo's blocks at `HIDDEN_SIZES`: qkv, proj, fc1, fc2, linear1, linear2."""
    return [
        LinearShape(num_outputs * hidden, num_inputs * hidden)
        for hidden in HIDDEN_SIZES
        for num_outputs, num_inputs in ((3, 1), (1, 1), (4, 1), (1, 4), (7, 1), (1, 5))
    ]


def model_shapes(kind: str, source: str, *, device: str, dtype: str) -> list[LinearShape]:
    """Return the distinct shapes of a model's layer groups, members joined.

    Raises:
        HyquantError: If the model cannot be loaded.
    """
    groups = load_model(kind, source, device=device, dtype=dtype).groups()
    return list(dict.fromkeys(LinearShape(sum(group.out_features), group.in_features) for group in groups))
