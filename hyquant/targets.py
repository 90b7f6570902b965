"""What a target cannot execute of a plan, as sentences: MindIE-SD passes over much of it without a message.

Sources: mindiesd 3.1.0 (`quantize` and the Linears that it puts in), its 2.3 line, torch_npu's operator documentation.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hyquant.config import Target

if TYPE_CHECKING:
    from hyquant.plan import QuantPlan

ATTENTION_TARGETS: Mapping[str, tuple[Target, ...]] = {
    "fa3_int8": ("hyquant", "mindie-sd-2.3/910b"),
    "fp8_dynamic": ("hyquant", "mindie-sd-3.1/950"),
}
"""What executes quantized attention: MindIE-SD lost int8 attention after its 2.3 line; float8 needs an Ascend 950."""

_EVERYTHING: tuple[Target, ...] = ("hyquant", "mindie-sd-3.1/910b", "mindie-sd-2.3/910b", "mindie-sd-3.1/950")
LINEAR_TARGETS: Mapping[str, tuple[Target, ...]] = {
    "w8a8_static": _EVERYTHING,
    "w8a8_dynamic": _EVERYTHING,
    "w8a8_timestep": _EVERYTHING,
    "w8a16": _EVERYTHING,
    "w4a16": _EVERYTHING,
    "w4a8": ("hyquant",),
    "w4a4_dynamic": ("hyquant", "mindie-sd-3.1/910b", "mindie-sd-3.1/950"),
}
"""What executes the schemes of Linears; MindIE-SD 3.1 knows the name W4A8, but passes over it."""

WITHOUT_MULTIPLIER = ("w8a16", "w4a16", "w4a4_dynamic")
"""Schemes whose Linears in MindIE-SD do not multiply their input, although they look for the multiplier's tensor."""


def target_problem(plan: "QuantPlan", target: Target) -> str | None:
    """Return why a target cannot execute a plan, None if it can."""
    return misread_problem(plan, target) or ignored_problem(plan, target) or attention_problem(plan, target)


def misread_problem(plan: "QuantPlan", target: Target) -> str | None:
    """Return why a target would compute something else than a plan says, None if it would not.

    What it leaves in float without a message is told by `ignored_problem` and `attention_problem`.
    """
    return dtype_problem(plan, target) or fold_problem(plan, target) or tensor_problem(plan, target)


def is_engine(target: Target) -> bool:
    """Return whether a target is a line of MindIE-SD."""
    return target.startswith("mindie-sd")


def dtype_problem(plan: "QuantPlan", target: Target) -> str | None:
    """Return why a target cannot run in the dtype that a plan deploys to, None if it can."""
    if not is_engine(target) or plan.config.deploy_dtype != "float32":
        return None
    return (
        f"{target} runs in bfloat16 or float16 and would round scales to it, but deploy_dtype is float32; deploy to "
        "bfloat16 or float16, or use target hyquant"
    )


def fold_problem(plan: "QuantPlan", target: Target) -> str | None:
    """Return why a target cannot execute what a plan folds, None if it can.

    MindIE-SD reads the tensors of quantized layers only: a float layer keeps the weights the engine had before.
    """
    if not plan.rewritten or not is_engine(target):
        return None
    names = [layer.name for layer in plan.rewritten]
    return (
        f"{target} loads quantized layers only, but smoothing would be folded into {names[0]} ({len(names)} in all), "
        "which stays in float; use placement multiplier, or quantize it too"
    )


def ignored_problem(plan: "QuantPlan", target: Target) -> str | None:
    """Return why a target leaves the Linears of a plan in float, None if it does not."""
    if plan.config.linear is None or not plan.quantized or target in LINEAR_TARGETS[plan.config.linear.kind]:
        return None
    kind = plan.config.linear.kind
    return (
        f"{target} leaves {kind} layers in float without a message, but the plan has {len(plan.quantized)} of "
        f"them; use target {' or '.join(LINEAR_TARGETS[kind])}, or another scheme"
    )


def tensor_problem(plan: "QuantPlan", target: Target) -> str | None:
    """Return which tensors of a plan's Linears a target does not use, None if it uses all."""
    if plan.config.linear is None or not plan.quantized or not is_engine(target):
        return None
    linear, kind = plan.config.linear, plan.config.linear.kind
    multiplied = [layer.name for layer in plan.quantized if layer.has_multiplier]
    if kind in WITHOUT_MULTIPLIER and multiplied:
        return (
            f"{target} does not multiply the input of a {kind} layer, but smoothing would give {multiplied[0]} a "
            f"multiplier ({len(multiplied)} in all); drop the smoothing, or use target hyquant"
        )
    biased = [layer.name for layer in plan.quantized if layer.has_bias]
    if kind == "w4a4_dynamic" and biased:
        return (
            f"{target} wants the bias of a w4a4_dynamic layer but does not add it, and {biased[0]} has one "
            f"({len(biased)} such layers); exclude them, or use target hyquant"
        )
    if linear.kind == "w4a16" and linear.group_size:
        return (
            f"{target} loads one scale per output channel of a w4a16 layer, but group_size is {linear.group_size}; use "
            "group_size 0, or target hyquant"
        )
    return None


def attention_problem(plan: "QuantPlan", target: Target) -> str | None:
    """Return why a target cannot execute the attention of a plan, None if it can."""
    blocks = plan.quantized_attentions
    if not blocks or blocks[0].scheme is None or target in ATTENTION_TARGETS[blocks[0].scheme]:
        return None
    scheme = blocks[0].scheme
    what = "ignores int8 attention without a message" if scheme == "fa3_int8" else "has no float8 attention"
    return (
        f"{target} {what}, but the plan quantizes the attention of {len(blocks)} blocks as {scheme}; "
        f"use target {' or '.join(ATTENTION_TARGETS[scheme])}, or leave attention in float"
    )
