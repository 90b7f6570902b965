"""What a session does to a model, one config per processor: quantizers, smoothings, attention, and where to save.

Names and fields are those of msModelSlim's `msmodelslim.quant`; what is new has a default.
"""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from hyquant.config import ActMethod, Target
from hyquant.export.manifest import Layout
from hyquant.export.names import FileNames, default_names
from hyquant.session.values import SessionValue

_GIB = 2**30


class W8A8QuantConfig(SessionValue):
    """How ranges of activations are found: "minmax" (true extremes), "mean_minmax", "histogram" or "mix".

    msModelSlim's "minmax" is the mean over calls of each call's extremes: "mean_minmax" here.
    """

    act_method: ActMethod = "minmax"


class W8A8DynamicQuantConfig(SessionValue):
    """As `W8A8QuantConfig`; dynamic activations store no range, so `act_method` has no effect."""

    act_method: ActMethod = "minmax"


class W8A8TimeStepQuantConfig(SessionValue):
    """As `W8A8QuantConfig`, with one range per denoising step.

    Row t of the tables comes from the calls of step t (`rows="step"`), or of step t and all later ones
    (`rows="suffix"`, what msModelSlim stores).
    """

    act_method: ActMethod = "minmax"
    rows: Literal["step", "suffix"] = "step"


class QuantizerConfig(SessionValue):
    """What every quantizer has: the Linears to leave in float.

    `disable_names` are exact names, no patterns, as `get_disable_layer_names` returns them; each must be a Linear of
    the model.
    """

    disable_names: tuple[str, ...] = ()


class W8A8ProcessorConfig(QuantizerConfig):
    """int8 weights per output channel, int8 activations per tensor with one range for all steps."""

    cfg: W8A8QuantConfig = W8A8QuantConfig()


class W8A8DynamicProcessorConfig(QuantizerConfig):
    """int8 weights per output channel, int8 activations per token with the range of each input."""

    cfg: W8A8DynamicQuantConfig = W8A8DynamicQuantConfig()


class W8A8TimeStepProcessorConfig(QuantizerConfig):
    """Dynamic before step `timestep_sep` (0-based), then static with one range per denoising step.

    A `timestep_sep` at or above the number of recorded steps makes every step dynamic, with a warning.
    """

    cfg: W8A8TimeStepQuantConfig = W8A8TimeStepQuantConfig()
    timestep_sep: Annotated[int, Field(ge=0)]


class FA3ProcessorConfig(SessionValue):
    """Attention on int8 q, k and v with one stored scale per head; needs a quantizer beside it.

    The scale is of the narrowest interval that holds 0.9999 of the values of q and k, and all of v.
    """


class SmoothingConfig(SessionValue):
    """What every smoothing has: patterns over canonical names of the Linears whose input is divided by s.

    `layers=None` smooths what msModelSlim does, the q, k and v projections of HunyuanVideo's double blocks; in any
    other model, every quantized Linear.
    """

    layers: tuple[str, ...] | None = None


class M3ProcessorConfig(SmoothingConfig):
    """Activation-aware scaling: s from the mean |activation| to a searched power (AWQ, arXiv:2306.00978, section 3.2).

    `records` says which calls the search looks at: "all", or the "first" one (of each rank). None is "first" under
    `SessionConfig(calibration="sequential")`, as msModelSlim has it, and "all" else.
    """

    records: Literal["all", "first"] | None = None


class M4ProcessorConfig(SmoothingConfig):
    """Iterative smooth: s = sqrt(act_absmax / weight_absmax) (SmoothQuant, arXiv:2211.10438, eq. 4, alpha 0.5)."""


class M6Config(SessionValue):
    """Exponents of s = act_absmax ** alpha / weight_absmax ** beta, in [0, 1]; without them both are searched."""

    alpha: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    beta: Annotated[float, Field(ge=0.0, le=1.0)] | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "M6Config":
        if (self.alpha is None) != (self.beta is None):
            raise ValueError(
                f"alpha and beta of M6Config must be given together, but got {self.alpha} and {self.beta}; leave both "
                "out to search them."
            )
        return self


class M6ProcessorConfig(SmoothingConfig):
    """Flexible smooth: two exponents, given or searched per layer."""

    cfg: M6Config = M6Config()


class SaveProcessorConfig(SessionValue):
    """Where the result goes: a folder of its own, as `hyquant.save_quantized` writes it.

    Attributes:
        output_path: The folder to make.
        safetensors_name: Name of the tensor file; None for the one that engines expect. Each rank may give its own.
        json_name: Name of the description; as above.
        save_type: ["safe_tensor"] is what there is.
        part_file_size: Most GiB of tensors in one file; None for one file.
        overwrite: Replace an export that is there already.
        target: What is meant to execute it; what the target cannot execute is refused before calibration.
        layout: Whose layer names to write; a model that is not diffusers' HunyuanVideo keeps its own.
    """

    output_path: str | Path
    safetensors_name: str | None = None
    json_name: str | None = None
    save_type: tuple[str, ...] = ("safe_tensor",)
    part_file_size: Annotated[float, Field(gt=0)] | None = None
    overwrite: bool = False
    target: Target = "hyquant"
    layout: Layout = "original"

    @field_validator("save_type")
    @classmethod
    def _type_is_known(cls, save_type: tuple[str, ...]) -> tuple[str, ...]:
        if save_type != ("safe_tensor",):
            raise ValueError(
                f"save_type must be ['safe_tensor'], but got {list(save_type)}; other formats are not written."
            )
        return save_type

    @model_validator(mode="after")
    def _names_are_files(self) -> "SaveProcessorConfig":
        self.names("none")
        return self

    @property
    def part_size_bytes(self) -> int | None:
        """Return `part_file_size` in bytes."""
        return None if self.part_file_size is None else max(1, int(self.part_file_size * _GIB))

    def names(self, quant_type: str) -> FileNames:
        """Return the names of the two files, for a type of the description such as "W8A8_TIMESTEP"."""
        default = default_names(quant_type)
        return FileNames(
            weights=self.safetensors_name or default.weights, description=self.json_name or default.description
        )


Quantizer: TypeAlias = W8A8ProcessorConfig | W8A8DynamicProcessorConfig | W8A8TimeStepProcessorConfig
Smoother: TypeAlias = M3ProcessorConfig | M4ProcessorConfig | M6ProcessorConfig
