"""What one denoiser step costs on paper: operations by kind of layer, and seconds on a device that is described.

HunyuanVideo, per sample and step, with N video tokens, L text tokens and S = N + L:

    N = ((frames - 1) / 4 + 1) (height / 16) (width / 16)
    a Linear of K inputs and O outputs over M rows        2 M K O operations
    the attention of a block with A heads of D channels   4 S^2 A D operations (q k^T and the product with v)
    seconds of a product                                  operations / (peak of its dtype * efficiency)
    seconds to quantize an input                          M K (bytes read + 1 byte written) / bandwidth

M is N for what sees the video, L for text, S for single blocks, 1 for modulation and embeddings of time and guidance.
The peak of a device counts a multiplication and an addition as two operations, as data sheets do. Norms, activation
functions and rotary embeddings are left out: they are bound by memory and take a few percent.

Sources: the formulas are those of dense transformers (Kaplan et al., arXiv:2001.08361, section 2.1, without its
approximations); strides of the autoencoder and the patch size are HunyuanVideo's (arXiv:2412.03603).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from hyquant.config import FrozenModel
from hyquant.models.attentions import AttentionBlock
from hyquant.models.base import DeploymentShape
from hyquant.models.names import LayerGroup
from hyquant.plan import QuantPlan
from hyquant.schemes import SCHEMES

ATTENTION = "attention"
MODULATION = "modulation and embeddings"
TEXT = "text side"

_IMAGE_KINDS = {"attn_qkv": "img qkv", "attn_proj": "img proj", "mlp.fc1": "img fc1", "mlp.fc2": "img fc2"}
_ONE_ROW = ("_mod.", "modulation", "time_in", "vector_in", "guidance_in", ".t_embedder", ".c_embedder")
_FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Efficiency(FrozenModel):
    """What part of its peak a device reaches, by kind of product."""

    linear: Annotated[float, Field(gt=0, le=1)] = 1.0
    attention: Annotated[float, Field(gt=0, le=1)] = 1.0


class DeviceProfile(FrozenModel):
    """A device on paper.

    Attributes:
        name: What it is called in reports.
        dtype: The float dtype that models run in there.
        peak_tflops: Peak of products by operand dtype, 10^12 operations per second; `dtype` must be among them.
        bandwidth_gb_s: Memory bandwidth, 10^9 bytes per second; None counts no time for quantizing inputs.
        efficiency: What part of the peaks is reached.
        cards: How many of them share one sample, ideally.
        int8_attention: Whether it has a kernel for attention on int8.
    """

    name: str
    dtype: str = "bfloat16"
    peak_tflops: dict[str, Positive]
    bandwidth_gb_s: Positive | None = None
    efficiency: Efficiency = Efficiency()
    cards: Annotated[int, Field(ge=1)] = 1
    int8_attention: bool = False

    @model_validator(mode="after")
    def _float_dtype_has_a_peak(self) -> "DeviceProfile":
        if self.dtype not in self.peak_tflops or self.dtype not in _FLOAT_BYTES:
            raise ValueError(
                f"dtype must be one of {sorted(_FLOAT_BYTES)} and have a peak, but {self.dtype} is not among "
                f"{sorted(self.peak_tflops)}; give peak_tflops of it"
            )
        return self

    def rate(self, dtype: str) -> float:
        """Return operations per second of products of a dtype; those of the float dtype if it has none of its own."""
        return 1e12 * self.peak_tflops.get(dtype, self.peak_tflops[self.dtype])


@dataclass(frozen=True)
class Tokens:
    """How many rows parts of the denoiser see, per sample."""

    video: int
    text: int

    @property
    def all(self) -> int:
        """Return video and text together."""
        return self.video + self.text


@dataclass(frozen=True)
class Work:
    """The products of one layer group or one attention in one denoiser step.

    Attributes:
        name: Canonical name of the layer, or of the block that owns the attention.
        kind: What it is counted under, such as "img fc1".
        operations: Multiplications and additions.
        input_values: Values that are quantized if it is: M K of a Linear; q, k and v of an attention.
    """

    name: str
    kind: str
    operations: int
    input_values: int


def tokens_of(shape: DeploymentShape, *, text: int, patch: int = 16, stride: int = 4) -> Tokens:
    """Return the tokens of a clip.

    Args:
        shape: The clip; pixels and frames.
        text: Text tokens; 256 for HunyuanVideo.
        patch: Pixels per token and side.
        stride: Frames per latent frame, after the first one.
    """
    frames = (shape.num_frames - 1) // stride + 1
    return Tokens(frames * (shape.height // patch) * (shape.width // patch), text)


def rows_of(name: str, tokens: Tokens) -> int:
    """Return the rows that a layer of HunyuanVideo sees per sample, by its canonical name."""
    by_kind = {MODULATION: 1, TEXT: tokens.text}
    return by_kind.get(kind_of(name), tokens.all if name.startswith("single_blocks.") else tokens.video)


def kind_of(name: str) -> str:
    """Return what a layer of HunyuanVideo is counted under, by its canonical name."""
    if any(mark in name for mark in _ONE_ROW):
        return MODULATION
    if name.startswith("single_blocks."):
        return name.rpartition(".")[2]
    if ".txt_" in name or name.startswith("txt_in"):
        return TEXT
    return next((kind for part, kind in _IMAGE_KINDS.items() if name.endswith(f"img_{part}")), "others")


def work_of(
    groups: Iterable[LayerGroup], attentions: Iterable[AttentionBlock], tokens: Tokens, *, batch_size: int = 1
) -> tuple[Work, ...]:
    """Return the products of one denoiser step.

    Args:
        groups: The layers of a HunyuanVideo denoiser.
        attentions: Its attentions.
        tokens: What one sample has.
        batch_size: Samples in a step.
    """
    found = []
    for group in groups:
        values = batch_size * rows_of(group.name, tokens) * group.in_features
        found.append(Work(group.name, kind_of(group.name), 2 * values * sum(group.out_features), values))
    for block in attentions:
        values = batch_size * tokens.all * block.heads * block.head_dim
        found.append(Work(block.name, ATTENTION, 4 * values * tokens.all, 3 * values))
    return tuple(found)


def operations_by_kind(work: Iterable[Work]) -> dict[str, int]:
    """Return the operations of each kind, in the order of their first layer."""
    found: dict[str, int] = {}
    for part in work:
        found[part.kind] = found.get(part.kind, 0) + part.operations
    return found


def modes_of(plan: QuantPlan, device: DeviceProfile) -> dict[str, str]:
    """Return the operand dtype of each product that a plan quantizes and the device executes, by name of its work.

    Products of weight-only schemes run in the float dtype. Codes of 4 bits are multiplied as int8 ones, as our kernels
    do; a device with faster products of int4 is not counted.
    """
    modes = {layer.name: "int8" for layer in plan.quantized if not SCHEMES[str(layer.scheme)].is_weight_only}
    if device.int8_attention:
        modes |= {block.name: "int8" for block in plan.attentions if block.scheme == "fa3_int8"}
    return modes


def seconds_of(work: Sequence[Work], device: DeviceProfile, modes: Mapping[str, str]) -> dict[str, float]:
    """Return the seconds of one denoiser step by kind.

    Args:
        work: All products.
        device: Where.
        modes: Operand dtype of the products that do not run in the device's float dtype, by name of their work.
    """
    found: dict[str, float] = {}
    for part in work:
        mode = modes.get(part.name, device.dtype)
        efficiency = device.efficiency.attention if part.kind == ATTENTION else device.efficiency.linear
        seconds = part.operations / (device.rate(mode) * efficiency)
        if mode != device.dtype and device.bandwidth_gb_s is not None:
            seconds += part.input_values * (_FLOAT_BYTES[device.dtype] + 1) / (1e9 * device.bandwidth_gb_s)
        found[part.kind] = found.get(part.kind, 0.0) + seconds / device.cards
    return found
