"""One point of the search: what is done to which layers, as a frozen value.

`QuantConfig` says how Linears are quantized (`linear`), whether outliers are suppressed first (`smoothing`) and which
layers take part (`layers`). Alternatives are discriminated by `kind`, so a field exists only where it means something
and an impossible combination cannot be constructed. `digest(config)` names caches, folders and runs.
"""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

ActMethod = Literal["minmax", "mean_minmax"]
DeployDtype = Literal["bfloat16", "float16", "float32"]


class FrozenModel(BaseModel):
    """A frozen pydantic value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class W8A8Static(FrozenModel):
    """int8 weights per output channel, int8 activations per tensor with one range for all steps."""

    kind: Literal["w8a8_static"] = "w8a8_static"
    act_method: ActMethod = "minmax"


class W8A8Dynamic(FrozenModel):
    """int8 weights per output channel, int8 activations per token with the range of each input."""

    kind: Literal["w8a8_dynamic"] = "w8a8_dynamic"


class W8A8Timestep(FrozenModel):
    """Dynamic before `timestep_sep`, then static with one range per denoising step.

    `timestep_sep` is a 0-based step index: steps `0 .. timestep_sep - 1` are dynamic; 0 means every step is static and
    a value equal to the number of steps means every step is dynamic.
    """

    kind: Literal["w8a8_timestep"] = "w8a8_timestep"
    act_method: ActMethod = "minmax"
    timestep_sep: Annotated[int, Field(ge=0)]


LinearScheme = Annotated[W8A8Static | W8A8Dynamic | W8A8Timestep, Field(discriminator="kind")]


class M4(FrozenModel):
    """Iterative smooth: s = act_absmax ** alpha / weight_absmax ** (1 - alpha), kept as a run-time multiplier 1 / s.

    `layers` are glob patterns over canonical names; of the selected layers only those that match are smoothed.
    """

    kind: Literal["m4"] = "m4"
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    layers: tuple[str, ...] = ("*attn_qkv", "*mlp.fc1", "*single_blocks.*.linear1")


Smoothing = M4


class LayerSelection(FrozenModel):
    """Glob patterns over canonical layer names; a layer takes part if included and not excluded (exclude wins)."""

    include: tuple[str, ...] = ("*double_blocks*", "*single_blocks*")
    exclude: tuple[str, ...] = ()


class QuantConfig(FrozenModel):
    """A complete quantization of one denoiser.

    `linear=None` leaves every Linear in float (the control). `deploy_dtype` is the dtype the scales must be exactly
    representable in, because the inference engine casts them to it.
    """

    linear: LinearScheme | None
    smoothing: Smoothing | None = None
    layers: LayerSelection = LayerSelection()
    deploy_dtype: DeployDtype = "bfloat16"


def digest(value: BaseModel | JsonValue, *, length: int = 16) -> str:
    """Return the first `length` hex digits of the SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]
