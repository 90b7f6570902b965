"""One point of the search: what is done to which layers, as a frozen value.

`QuantConfig` says how Linears are quantized (`linear`), whether outliers are suppressed first (`smoothing`), whether
attention is quantized (`attention`), which layers take part (`layers`) and how records are looked at (`calibration`).
Alternatives are discriminated by `kind`, so a field exists only where it means something
and an impossible combination cannot be constructed. `digest(config)` names caches, folders and runs.
"""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

ActMethod = Literal["minmax", "mean_minmax", "histogram", "mix"]
Target = Literal["hyquant", "mindie-sd-3.1/910b", "mindie-sd-2.3/910b", "mindie-sd-3.1/950"]
"""What is meant to execute an export: an engine's line, and the hardware generation."""
DeployDtype = Literal["bfloat16", "float16", "float32"]


class FrozenModel(BaseModel):
    """A frozen pydantic value that refuses unknown fields; its JSON keeps NaN and Infinity, as Python's does."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class StoredRange(FrozenModel):
    """How a range that is stored with the weights is found.

    `act_method` is a key of `hyquant.observers.OBSERVERS`. `percentile` narrows its range to the one that holds this
    share of all values, half of the rest cut off at either end; None cuts nothing.
    """

    act_method: ActMethod = "minmax"
    percentile: Annotated[float, Field(gt=0.5, lt=1.0)] | None = None


class W8A8Static(StoredRange):
    """int8 weights per output channel, int8 activations per tensor with one range for all steps."""

    kind: Literal["w8a8_static"] = "w8a8_static"


class W8A8Dynamic(FrozenModel):
    """int8 weights per output channel, int8 activations per token with the range of each input."""

    kind: Literal["w8a8_dynamic"] = "w8a8_dynamic"


class W8A8Timestep(StoredRange):
    """Dynamic before `timestep_sep`, then static with one range per denoising step.

    `timestep_sep` is a 0-based step index: steps `0 .. timestep_sep - 1` are dynamic; 0 means every step is static and
    a value equal to the number of steps means every step is dynamic. Row t of the tables comes from the records of step
    t (`rows="step"`) or of step t and all later ones (`rows="suffix"`, what msModelSlim stores).
    """

    kind: Literal["w8a8_timestep"] = "w8a8_timestep"
    timestep_sep: Annotated[int, Field(ge=0)]
    rows: Literal["step", "suffix"] = "step"


class W8A16(FrozenModel):
    """int8 weights per output channel; activations stay in float."""

    kind: Literal["w8a16"] = "w8a16"


class W4A16(FrozenModel):
    """int4 weights, one scale per output channel and group of input channels; activations stay in float.

    `group_size` is the number of consecutive input channels that share a scale; 0 means all of a row, the only one that
    MindIE-SD loads. It must divide the input channels of every layer.
    """

    kind: Literal["w4a16"] = "w4a16"
    group_size: Annotated[int, Field(ge=0, multiple_of=32)] = 128


class W4A8(FrozenModel):
    """int4 weights per output channel, int8 activations per token with the range of each input."""

    kind: Literal["w4a8"] = "w4a8"


class W4A4Dynamic(FrozenModel):
    """int4 weights per output channel, int4 activations per token with the range of each input.

    Input channels must be a multiple of 8. Engines add no bias to these layers, so they take those without one.
    """

    kind: Literal["w4a4_dynamic"] = "w4a4_dynamic"


LinearScheme = Annotated[
    W8A8Static | W8A8Dynamic | W8A8Timestep | W8A16 | W4A16 | W4A8 | W4A4Dynamic, Field(discriminator="kind")
]


class SmoothedLayers(FrozenModel):
    """Which of the selected layers are smoothed, and where the input is divided by the smoothing scale s.

    `layers` are glob patterns over canonical names. `placement` "multiplier" multiplies the input by 1 / s at run time;
    "fold" divides in the weights of the layer that produces the input, at no cost, where there is such a layer and the
    export's target loads it.
    """

    layers: tuple[str, ...] = ("*attn_qkv", "*mlp.fc1", "*single_blocks.*.linear1")
    placement: Literal["multiplier", "fold"] = "multiplier"


class M3(SmoothedLayers):
    """Activation-aware scaling: s from mean |activation| to a searched power that loses least in int8 weights.

    `records` "first" looks at the first record only, as msModelSlim does.
    """

    kind: Literal["m3"] = "m3"
    records: Literal["all", "first"] = "all"


class M4(SmoothedLayers):
    """Iterative smooth: s = act_absmax ** alpha / weight_absmax ** (1 - alpha)."""

    kind: Literal["m4"] = "m4"
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5


class M6(SmoothedLayers):
    """Flexible smooth: s = act_absmax ** alpha / weight_absmax ** beta, both given, or both searched per layer."""

    kind: Literal["m6"] = "m6"
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    beta: Annotated[float, Field(ge=0.0, le=1.0)] | None = None

    @property
    def is_searched(self) -> bool:
        """Say whether alpha and beta are searched."""
        return self.alpha is None

    @model_validator(mode="after")
    def _is_complete(self) -> "M6":
        if (self.alpha is None) != (self.beta is None):
            raise ValueError("alpha and beta must be given together, or neither to search both")
        return self


Smoothing = Annotated[M3 | M4 | M6, Field(discriminator="kind")]


class FA3Int8(FrozenModel):
    """Attention on int8 q, k and v, symmetric, with one stored scale per head (the seed's fa3, description "FAQuant").

    `statistic` "window" takes the narrowest interval that holds a share of each head's values, `ratio_qk` for q and k
    and `ratio_v` for v; "absmax" takes the largest magnitude. `layers` are patterns over the blocks that own an
    attention.
    """

    kind: Literal["fa3_int8"] = "fa3_int8"
    statistic: Literal["window", "absmax"] = "window"
    ratio_qk: Annotated[float, Field(gt=0.5, le=1.0)] = 0.9999
    ratio_v: Annotated[float, Field(gt=0.5, le=1.0)] = 1.0
    layers: tuple[str, ...] = ("*double_blocks*", "*single_blocks*")


class FA3Fp8(FrozenModel):
    """Attention on float8 q, k and v with a scale per block of tokens, computed on the fly (description "FP8_DYNAMIC").

    `rotate` multiplies q and k by the same orthogonal matrix first, which spreads outliers and cancels in q k^T.
    """

    kind: Literal["fp8_dynamic"] = "fp8_dynamic"
    rotate: bool = True
    layers: tuple[str, ...] = ("*double_blocks*", "*single_blocks*")


AttentionScheme = Annotated[FA3Int8 | FA3Fp8, Field(discriminator="kind")]


class LayerSelection(FrozenModel):
    """Glob patterns over canonical layer names; a layer takes part if included and not excluded (exclude wins)."""

    include: tuple[str, ...] = ("*double_blocks*", "*single_blocks*")
    exclude: tuple[str, ...] = ()


class QuantConfig(FrozenModel):
    """A complete quantization of one denoiser.

    `linear=None` and `attention=None` leave everything in float (the control). `calibration` "single_pass" observes the
    float model; "sequential" lets each layer see inputs that quantized layers before it produced, as msModelSlim does.
    `deploy_dtype` is the dtype the scales must be exactly representable in, because the inference engine casts them to
    it. `weight_division` is the dtype in which a weight over its scale is held before it is rounded to an integer:
    "float32" gives the nearest integer, "deploy_dtype" what msModelSlim gives for a model in that dtype, up to one
    away in bfloat16. The default is left out of the JSON, so that digests of before stay what they are.
    """

    linear: LinearScheme | None
    smoothing: Smoothing | None = None
    attention: AttentionScheme | None = None
    calibration: Literal["single_pass", "sequential"] = "single_pass"
    layers: LayerSelection = LayerSelection()
    deploy_dtype: DeployDtype = "bfloat16"
    weight_division: Annotated[
        Literal["float32", "deploy_dtype"], Field(exclude_if=lambda division: division == "float32")
    ] = "float32"

    @property
    def division_dtype(self) -> DeployDtype:
        """Return the dtype that `weight_division` means."""
        return "float32" if self.weight_division == "float32" else self.deploy_dtype


def digest(value: BaseModel | JsonValue, *, length: int = 16) -> str:
    """Return the first `length` hex digits of the SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]
