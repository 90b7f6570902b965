"""Quantized attention: what the engine attaches to a block as `fa_quant`, and a way to make any model call it.

The engine only attaches; the model's own code has to call `block.fa_quant(q, k, v)`. Models of tests do not, so
`rerouted` hands it whatever such a block gives to scaled_dot_product_attention.

    N heads   S tokens   D head dim
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tests.reference.files import ParametersInvalid
from tests.reference.operators import attend, demand, npu_dynamic_block_quant, npu_quantize, of_blocks
from tests.reference.typed import Typed, cast


class Int8Attention:
    """FAQuant, the 2.3 line: symmetric int8 q, k, v with a stored scale per head [N, 1].

    Scores are (q_int8 k_int8^T) * (q_scale * k_scale) / sqrt(D); the weights of the sum over v stay float here, as the
    contract says nothing of them.
    """

    def __init__(self, tensors: dict[str, Typed], block: str, dtype: str) -> None:
        self.dtype, self.scales = dtype, {}
        for part in "qkv":
            for kind in ("scale", "offset"):
                if f"{block}.fa_{part}.{kind}" not in tensors:
                    raise ParametersInvalid(f"Critical parameter missing: {block}.fa_{part}.{kind}.")
            if tensors[f"{block}.fa_{part}.offset"].values.any():
                raise ParametersInvalid(f"{block}.fa_{part}.offset must be 0")
            self.scales[part] = cast(tensors[f"{block}.fa_{part}.scale"], dtype)

    def __call__(self, q: Typed, k: Typed, v: Typed) -> Typed:
        codes = {part: self.codes(x, self.scales[part]) for part, x in (("q", q), ("k", k), ("v", v))}
        scale = {part: found.values[:, :, None] for part, found in self.scales.items()}
        factor = scale["q"] * scale["k"] / np.float32(math.sqrt(q.shape[-1]))
        return cast(attend(codes["q"], codes["k"], codes["v"], factor) * scale["v"], self.dtype)

    def codes(self, x: Typed, scale: Typed) -> np.ndarray:
        """Quantize [N, S, D] head by head with the scale repeated over D; return int8 values as float32."""
        demand(scale.shape == (x.shape[0], 1), "QuantFA", f"scales of shape ({x.shape[0]}, 1)", scale.shape)
        kind = "bfloat16" if self.dtype == "bfloat16" else "float32"
        heads = []
        for head, values in enumerate(x.values):
            repeated = Typed(scale.values[head].repeat(x.shape[-1]), kind)
            heads.append(npu_quantize(Typed(values, x.dtype), repeated, Typed(np.zeros_like(repeated.values), kind)))
        return np.stack([found.values for found in heads]).astype(np.float32)


class Float8Attention:
    """FP8_DYNAMIC: q and k rotated, then e4m3 with a scale per 128 channels of 128 (q) or 256 (k, v) tokens."""

    def __init__(self, tensors: dict[str, Typed], block: str, dtype: str) -> None:
        self.dtype = dtype
        for part in "qk":
            if f"{block}.{part}_rot" not in tensors:
                raise ParametersInvalid(f"Critical parameter missing: {block}.{part}_rot.")
        self.rotations = [tensors[f"{block}.{part}_rot"] for part in "qk"]

    def __call__(self, q: Typed, k: Typed, v: Typed) -> Typed:
        q, k = (self.rotated(x, rotation) for x, rotation in zip((q, k), self.rotations, strict=True))
        q8, k8, v8 = (self.through_float8(x, rows) for x, rows in ((q, 128), (k, 256), (v, 256)))
        factor = np.full((q8.shape[0], 1, 1), 1 / math.sqrt(q8.shape[-1]), np.float32)
        return cast(attend(q8, k8, v8, factor), self.dtype)

    def rotated(self, x: Typed, rotation: Typed) -> Typed:
        """Multiply by an orthogonal [D, D], which is used as it is stored and so must be in the dtype of x."""
        demand(rotation.dtype == x.dtype, "matmul", f"operands of one dtype, {x.dtype}", rotation.dtype)
        return cast(x.values @ rotation.values, x.dtype)

    def through_float8(self, x: Typed, row_block: int) -> np.ndarray:
        return of_blocks(*npu_dynamic_block_quant(x, row_block=row_block), row_block=row_block)


class _Rerouting(TorchFunctionMode):
    """Give q, k, v of the block that runs to `answer(block, q, k, v)`, others to torch."""

    def __init__(self, answer: Callable[[str, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.block: str | None = None
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.block is None:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        given = dict(zip(names, args, strict=False)) | kwargs
        mask = given.get("attn_mask")
        if mask is not None and not bool((mask if mask.dtype == torch.bool else mask == 0).all()):
            raise ValueError("quantized attention takes no mask; trim the text")
        return self.answer(self.block, given["query"], given["key"], given["value"])


@contextmanager
def rerouted(
    model: nn.Module, blocks: dict[str, Any], answer: Callable[[str, Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Answer attention calls inside the named blocks with `answer(block, q, k, v)` on [..., N, S, D]."""
    mode = _Rerouting(answer)
    handles = []
    for name in blocks:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: setattr(mode, "block", name)))
        handles.append(module.register_forward_hook(lambda *_: setattr(mode, "block", None)))
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


def quantized_attention(attentions: dict[str, Any], dtype: str) -> Callable[[str, Tensor, Tensor, Tensor], Tensor]:
    """Return the answer of `fa_quant` on one sample, given and returned as torch [N, S, D] or [1, N, S, D]."""

    def answer(block: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (cast(x.detach().float().reshape(x.shape[-3:]).numpy(), dtype) for x in (q, k, v))
        return torch.from_numpy(attentions[block](*parts).values).reshape(q.shape).to(q.dtype)

    return answer
