"""The attention of every block of a HunyuanVideo denoiser, and how something is put in front of it.

A *hook* gets q, k and v as they enter the attention (after normalization and rotary embedding, video and text together,
[B, S, A, D]) and returns what the attention is to see instead. Both layouts are understood: in diffusers the block's
attention gets another processor; in the original one the block, and no other, gets copies of its methods for which the
module-wide functions `attention` and `parallel_attention` are ones that call the hook first.

In diffusers' layout the attention itself can be replaced as well: by a hook that attends where it is (an
`AttendingHook`), or for one that spans several ranks. Hooks stay in front of the latter, whichever was put in first,
and do not attend then.

B batch   S tokens   A heads   D head dim
"""

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from hyquant.errors import ConfigError, LayerMatchError

if TYPE_CHECKING:
    from hyquant.models.hunyuan_attention import BlockProcessor

QkvHook: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
"""Called as hook(q, k, v, valid); `valid` is [B, S] bool, False for padded tokens, or None if there are none.

A hook whose attribute `needs_all_tokens` is true cannot work on the strip of tokens that one of several ranks has.
"""


@runtime_checkable
class AttendingHook(Protocol):
    """A hook that, where it can, attends itself instead of changing what the block's attention sees."""

    @property
    def device(self) -> torch.device:
        """Return where it attends; elsewhere it is a hook like others."""
        ...

    def can_attend(self, head_dim: int) -> bool:
        """Return whether it attends by heads of D channels there; asked once, when it is put in place."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Return the attention, [B, S, A, D], of what a hook is called with."""
        ...


OwnAttention: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Called as attend(q, k, v, valid): q [B, S_q, A, D] over k and v [B, S, A, D] of which `valid` [B, S] may be seen."""

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None, OwnAttention], Tensor]
"""Called as attend(q, k, v, valid, own) in place of a block's `own` attention; returns [B, S, A, D]."""

BLOCK_LISTS: Mapping[str, str] = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
"""Original name of each list of blocks -> its name in diffusers."""

_ORIGINAL_CALLS: Mapping[str, int] = {"attention": 0, "parallel_attention": 1}
"""Functions that the original blocks call -> the position of q; k and v follow it."""

_HEADS = (("attn.to_q", "attn.norm_q"), ("img_attn_proj", "img_attn_q_norm"), ("linear2", "q_norm"))
"""Where blocks tell the width of all heads, as output channels, and of one, as the size of its norm."""

_HOOKED = "_hyquant_hooked"


@dataclass(frozen=True)
class AttentionBlock:
    """A block that owns an attention.

    Attributes:
        name: Canonical name, as in `double_blocks.3`.
        module: Path of the block in the denoiser.
        heads: Number of heads.
        head_dim: Channels of a head.
    """

    name: str
    module: str
    heads: int
    head_dim: int


def attention_blocks(denoiser: nn.Module) -> tuple[AttentionBlock, ...]:
    """Return the blocks of a HunyuanVideo denoiser that own an attention, double blocks first.

    Args:
        denoiser: In diffusers or original layout, float or quantized; any other module has none.
    """
    return tuple(
        AttentionBlock(f"{original}.{index}", f"{path}.{index}", *heads)
        for original, diffusers in BLOCK_LISTS.items()
        for path in (original, diffusers)
        for index, block in enumerate(getattr(denoiser, path, ()))
        if (heads := _heads(block)) is not None
    )


def hook_attention_(denoiser: nn.Module, path: str, hook: QkvHook) -> None:
    """Let a hook change what the attention of one block sees; `unhook_attention_` undoes it.

    Args:
        denoiser: The denoiser; changed in place.
        path: Module path of the block.
        hook: What is called before the attention.

    Raises:
        LayerMatchError: If there is no such block.
        ConfigError: If the block has a hook already, or an attention that cannot be intercepted.
    """
    block = _block(denoiser, path)
    if _HOOKED in vars(block):
        raise ConfigError(f"the attention of {path} must have one hook at most, but has one; restore the denoiser.")
    if hasattr(block, "attn"):
        processor = _processor(block, path)
        if processor.attend is not None:
            _require_local(hook, path)
        processor.hook = hook
        processor.attending = None
        if isinstance(hook, AttendingHook) and hook.can_attend(_head_dim(block)):
            processor.attending = hook
        block.attn.processor = processor
        vars(block)[_HOOKED] = ()
        return
    methods = _intercepted_methods(block, hook)
    if not methods:
        raise ConfigError(
            f"the attention of {path} must be diffusers' or a call of {' or '.join(_ORIGINAL_CALLS)} in a method of "
            f"its class, but {type(block).__name__} has neither; leave attention in float."
        )
    for name, method in methods.items():
        vars(block)[name] = method
    vars(block)[_HOOKED] = tuple(methods)


def unhook_attention_(denoiser: nn.Module, path: str) -> None:
    """Put back what `hook_attention_` replaced; a block without a hook is left as it is."""
    block = _block(denoiser, path)
    methods = vars(block).pop(_HOOKED, None)
    if methods is None:
        return
    if hasattr(block, "attn"):
        block.attn.processor.hook = block.attn.processor.attending = None
        block.attn.processor = block.attn.processor.settled()
    for name in methods:
        del vars(block)[name]


def hook_attends(denoiser: nn.Module, path: str) -> bool:
    """Return whether the hook of a block attends itself as things are now."""
    from hyquant.models.hunyuan_attention import BlockProcessor

    block = _block(denoiser, path)
    processor = getattr(getattr(block, "attn", None), "processor", None)
    return isinstance(processor, BlockProcessor) and processor.attends_on(next(block.parameters()).device)


def hook_attentions_(denoiser: nn.Module, hooks: Mapping[str, QkvHook]) -> None:
    """Put several hooks in place, by module path of their blocks: all, or none if an error is raised."""
    done: list[str] = []
    try:
        for path, hook in hooks.items():
            hook_attention_(denoiser, path, hook)
            done.append(path)
    except BaseException:
        for path in done:
            unhook_attention_(denoiser, path)
        raise


@contextmanager
def hooked(denoiser: nn.Module, hooks: Mapping[str, QkvHook]) -> Iterator[None]:
    """Have hooks in place, by module path of their blocks, while the context lasts."""
    hook_attentions_(denoiser, hooks)
    try:
        yield
    finally:
        for path in hooks:
            unhook_attention_(denoiser, path)


def replace_attentions_(denoiser: nn.Module, attend: Attend) -> None:
    """Let something else attend in every block, for `put_back_attentions_` to undo; hooks stay in front of it.

    Args:
        denoiser: A denoiser in diffusers' layout; changed in place, unless an error is raised.
        attend: What is called instead of each block's attention.

    Raises:
        ConfigError: If an attention cannot be intercepted, or has a hook that needs all tokens.
    """
    processors = {
        block.module: _processor(_block(denoiser, block.module), block.module) for block in attention_blocks(denoiser)
    }
    for path, processor in processors.items():
        if processor.hook is not None:
            _require_local(processor.hook, path)
    for path, processor in processors.items():
        processor.attend = attend
        _block(denoiser, path).attn.processor = processor


def put_back_attentions_(denoiser: nn.Module) -> None:
    """Put back the attentions that `replace_attentions_` replaced; hooks stay."""
    for block in attention_blocks(denoiser):
        attn = _block(denoiser, block.module).attn
        attn.processor.attend = None
        attn.processor = attn.processor.settled()


def _processor(block: Any, path: str) -> "BlockProcessor":
    from hyquant.models.hunyuan_attention import BlockProcessor

    return BlockProcessor.in_place_of(block.attn.processor, path)


def _require_local(hook: QkvHook, path: str) -> None:
    if getattr(hook, "needs_all_tokens", False):
        raise ConfigError(
            f"under sequence parallelism attention is quantized on one rank's tokens, but {type(hook).__name__} of "
            f"{path} shares scales among tokens of several ranks; leave attention in float, use fa3_int8, or one rank."
        )


def _block(denoiser: nn.Module, path: str) -> Any:
    try:
        return denoiser.get_submodule(path)
    except AttributeError as error:
        raise LayerMatchError(
            f"the plan's block {path} must be one of the denoiser, but there is none; build the plan from its "
            "attention blocks."
        ) from error


def _heads(block: Any) -> tuple[int, int] | None:
    """Return number and size of a block's heads, read off its modules; None if it is no block of HunyuanVideo."""
    width_of, norm_of = next((paths for paths in _HEADS if all(_has(block, path) for path in paths)), (None, None))
    if width_of is None or norm_of is None:
        return None
    head_dim = int(block.get_submodule(norm_of).weight.shape[0])
    return int(block.get_submodule(width_of).out_features) // head_dim, head_dim


def _head_dim(block: nn.Module) -> int:
    heads = _heads(block)
    assert heads is not None
    return heads[1]


def _has(block: nn.Module, path: str) -> bool:
    try:
        return hasattr(block.get_submodule(path), "weight")
    except AttributeError:
        return False


def _intercepted_methods(block: nn.Module, hook: QkvHook) -> dict[str, types.MethodType]:
    """Return, bound to the block, copies of those methods of its class that call an attention function."""
    methods: dict[str, types.MethodType] = {}
    for kind in type(block).__mro__:
        for name, function in vars(kind).items():
            if isinstance(function, types.FunctionType) and name not in methods:
                called = [call for call in _ORIGINAL_CALLS if _calls(function, call)]
                if called:
                    methods[name] = types.MethodType(_intercepted(function, called, hook), block)
    return methods


def _calls(function: types.FunctionType, name: str) -> bool:
    return name in function.__code__.co_names and callable(function.__globals__.get(name))


def _intercepted(function: types.FunctionType, called: list[str], hook: QkvHook) -> types.FunctionType:
    """Return a copy of a function for which some global functions call the hook first; the original is untouched.

    Its code is a copy too, because `torch.compile` keeps its cache, and the globals it guards, by code. The globals go
    without `__name__`: by it the compiler would look for the functions in the module they came from.
    """
    own = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    own |= {name: _with_hook(own[name], _ORIGINAL_CALLS[name], hook) for name in called}
    copy = types.FunctionType(
        function.__code__.replace(), own, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    del copy.__dict__["__wrapped__"]
    return copy


def _with_hook(call: Callable[..., Any], first: int, hook: QkvHook) -> Callable[..., Any]:
    def attend(*args: Any, **kwargs: Any) -> Any:
        if len(args) < first + 3:
            raise ConfigError(
                f"q, k and v must be given to {call.__name__} by position, but it got {len(args)} arguments so; "
                "leave attention in float."
            )
        q, k, v = args[first : first + 3]
        q, k, v = hook(q, k, v, _valid_tokens(q, kwargs.get("cu_seqlens_q")))
        return call(*args[:first], q, k, v, *args[first + 3 :], **kwargs)

    return attend


def _valid_tokens(q: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """Return which tokens are no padding, [B, S].

    Args:
        q: [B, S, A, D].
        cu_seqlens: [2 B + 1] cumulative lengths of, in turns, a sample's tokens and its padding.
    """
    if cu_seqlens is None:
        return None
    size_B, size_S = q.shape[:2]
    starts = size_S * torch.arange(size_B, device=q.device)
    lengths = cu_seqlens[1::2].to(q.device) - starts
    return torch.arange(size_S, device=q.device) < lengths[:, None]
