"""Which int8 kernel runs what here: the table of `hyq-search doctor --kernels`, and a choice forced by hand."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from hyquant.attention.int8 import PARTS, Int8Attention
from hyquant.devices import resolve_device, resolve_torch_device
from hyquant.kernels import KERNELS
from hyquant.kernels.selection import FORCED, NOMINAL_ROWS, LinearShape, forced_kernel, kernel_for, kernel_times
from hyquant.kernels.x86_attention import attends_natively
from hyquant.kernels.x86_build import VNNI_BUILD
from hyquant.models import load_model
from hyquant.models.attentions import attention_blocks
from hyquant.timing import median_seconds

HIDDEN_SIZES = (256, 3072)
"""Of the shipped mini model and of HunyuanVideo 13B, whose Linears are looked at where no study is named."""

HEADS = ((4, 64), (24, 128))
"""Number and size of their heads."""

_ROUNDS = 5


@dataclass(frozen=True)
class KernelTime:
    """How long one kernel takes for one Linear or attention: a call with float32 input.

    Attributes:
        shape: Rows x input channels -> output channels of a Linear quantized per token; or heads x tokens x head dim.
        kernel: Key in `KERNELS`; "float" for attention in float, which simulated attention is.
        kind: "native" or "simulated".
        time_s: Median of one call.
        gops: Operations (2 M N K, or 4 A S^2 D) per nanosecond.
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


def attention_table(heads: Sequence[tuple[int, int]], device: str) -> list[KernelTime]:
    """Return the time of attention in float and, where there is a kernel, on int8, measured now.

    Args:
        heads: Number and size of heads of each attention, looked at with as many tokens as Linears have rows.
        device: Where.
    """
    place, tokens = resolve_torch_device(device), NOMINAL_ROWS
    rows: list[KernelTime] = []
    for num_heads, head_dim in heads:
        q, k, v = torch.randn(3, 1, num_heads, tokens, head_dim, device=place)
        calls: dict[str, Callable[[], object]] = {"float": partial(F.scaled_dot_product_attention, q, k, v)}
        if attends_natively(place, head_dim):
            scale = torch.full((num_heads, 1), 4 / 127, device=place)
            hook = Int8Attention({f"{part}.scale": scale for part in PARTS})
            q_first, k_first, v_first = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            calls[VNNI_BUILD.name] = partial(hook.attend, q_first, k_first, v_first, None)
        with torch.inference_mode():
            seconds = median_seconds(calls, partial(resolve_device(place.type).now_s, place.index or 0), _ROUNDS)
        operations = 4 * num_heads * tokens * tokens * head_dim
        chosen, shape = list(calls)[-1], f"{num_heads}x{tokens}x{head_dim}"
        rows += [
            KernelTime(
                f"attention {shape}",
                name,
                "simulated" if name == "float" else "native",
                time_s,
                operations / time_s / 1e9,
                name == chosen,
            )
            for name, time_s in seconds.items()
        ]
    return rows


def usual_shapes() -> list[LinearShape]:
    """Return the joined Linears of HunyuanVideo's blocks at `HIDDEN_SIZES`: qkv, proj, fc1, fc2, linear1, linear2."""
    return [
        LinearShape(num_outputs * hidden, num_inputs * hidden)
        for hidden in HIDDEN_SIZES
        for num_outputs, num_inputs in ((3, 1), (1, 1), (4, 1), (1, 4), (7, 1), (1, 5))
    ]


def model_shapes(kind: str, source: str, *, device: str, dtype: str) -> tuple[list[LinearShape], list[tuple[int, int]]]:
    """Return the distinct shapes of a model's layer groups, members joined, and heads of its attentions.

    Raises:
        HyquantError: If the model cannot be loaded.
    """
    model = load_model(kind, source, device=device, dtype=dtype)
    shapes = dict.fromkeys(LinearShape(sum(group.out_features), group.in_features) for group in model.groups())
    heads = dict.fromkeys((block.heads, block.head_dim) for block in attention_blocks(model.denoiser))
    return list(shapes), list(heads)
