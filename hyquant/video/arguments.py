"""What `hyquant.sample_video` was asked to do, as frozen values: what contradicts itself cannot be constructed.

Field names are the flags' with underscores; `flag` gives the spelling of the command line. Defaults are those of the
parameter table of msModelSlim's HunyuanVideo document.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from hyquant.config import ActMethod, FrozenModel, Target
from hyquant.models.base import GuidedSettings, RenderSettings

QuantType = Literal["w8a8_timestep", "w8a8_dynamic_fa3", "w8a8_dynamic", "w8a8"]
AntiMethod = Literal["m3", "m4", "m6"]
Resolution = Literal["540p", "720p"]
Dtype = Literal["float32", "bfloat16", "float16"]

LARGEST = {"540p": (544, 960), "720p": (720, 1280)}
"""Height and width of the largest videos of a resolution; all published sizes of one have at most so many pixels."""

EMBEDDED_CFG_SCALE = 6.0

_UNDERSCORED = ("do_quant", "do_save_video", "quant_weight_save_folder", "quant_dump_calib_folder", "quant_type")
_STORED_RANGES: tuple[QuantType, ...] = ("w8a8", "w8a8_timestep")


def flag(name: str) -> str:
    """Return the spelling of a field's flag: msModelSlim's own have underscores, all others hyphens."""
    return f"--{name}" if name in (*_UNDERSCORED, "anti_method") else f"--{name.replace('_', '-')}"


class Quantization(FrozenModel):
    """How to quantize, and where to put weights and calibration records.

    `timestep_sep=None` is half of the steps; `act_method=None` is "minmax".
    """

    quant_weight_save_folder: Path
    quant_dump_calib_folder: Path
    quant_type: QuantType = "w8a8_timestep"
    anti_method: AntiMethod | None = None
    act_method: ActMethod | None = None
    timestep_sep: Annotated[int, Field(ge=0)] | None = None
    target: Target = "hyquant"

    @property
    def label(self) -> str:
        """Return a short name for files, such as "w8a8_dynamic_m4"."""
        return self.quant_type if self.anti_method is None else f"{self.quant_type}_{self.anti_method}"

    @model_validator(mode="after")
    def _has_no_idle_flags(self) -> "Quantization":
        if self.act_method is not None and self.quant_type not in _STORED_RANGES:
            raise ValueError(
                f"--act-method says how stored ranges are found, but --quant_type {self.quant_type} stores none for "
                f"Linears; leave it out, or quantize as {' or '.join(_STORED_RANGES)}"
            )
        if self.timestep_sep is not None and self.quant_type != "w8a8_timestep":
            raise ValueError(
                f"--timestep-sep divides the steps of w8a8_timestep, but --quant_type is {self.quant_type}; leave it "
                "out, or quantize as w8a8_timestep"
            )
        return self


class Arguments(FrozenModel):
    """Everything on the command line.

    `quantization=None` renders float videos only. `flow_shift=None` is that of the checkpoint's scheduler, 7 if it has
    none. `seed=None` draws one. `dtype=None` is float32 on a CPU and bfloat16 elsewhere.
    """

    model_base: Path = Path("ckpts")
    dit_weight: Path = Path("ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt")
    vae_path: Path = Path("vae")
    text_encoder_path: Path = Path("text_encoder")
    text_encoder_2_path: Path = Path("clip-vit-large-patch14")
    load_key: str = "module"
    device: str = "auto"
    dtype: Dtype | None = None

    model_resolution: Resolution = "540p"
    video_size: tuple[Annotated[int, Field(ge=16)], Annotated[int, Field(ge=16)]] = (720, 1280)
    video_length: Annotated[int, Field(ge=1)] = 129
    infer_steps: Annotated[int, Field(ge=1)] = 50
    prompt: Annotated[str, Field(min_length=1)]
    neg_prompt: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    num_videos: Annotated[int, Field(ge=1)] = 1
    flow_reverse: bool = False
    flow_shift: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    embedded_cfg_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    cfg_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0

    ulysses_degree: Annotated[int, Field(ge=1)] = 1
    ring_degree: Annotated[int, Field(ge=1)] = 1
    vae_parallel: bool = False

    save_path: Path = Path("results")
    do_save_video: bool = False
    overwrite: bool = False
    quantization: Quantization | None = None

    @field_validator("video_size")
    @classmethod
    def _size_is_whole_tokens(cls, size: tuple[int, int]) -> tuple[int, int]:
        if any(side % 16 for side in size):
            near = " ".join(str(max(16, side // 16 * 16)) for side in size)
            raise ValueError(
                f"--video-size must be multiples of 16, but got {size[0]} {size[1]}; give {near}, for example"
            )
        return size

    @field_validator("video_length")
    @classmethod
    def _length_is_whole_latents(cls, length: int) -> int:
        if (length - 1) % 4:
            raise ValueError(
                f"--video-length must be 1 + a multiple of 4, but got {length}; give {(length - 1) // 4 * 4 + 1}, for "
                "example"
            )
        return length

    @model_validator(mode="after")
    def _flags_fit(self) -> "Arguments":
        problems = (self._size_problem(), self._sampling_problem(), self._folder_problem())
        if problem := next((problem for problem in problems if problem is not None), None):
            raise ValueError(problem)
        return self

    def settings(self) -> RenderSettings:
        """Return clip and sampling; one video at a time, as the upstream script renders."""
        height, width = self.video_size
        common = {
            "height": height,
            "width": width,
            "num_frames": self.video_length,
            "num_steps": self.infer_steps,
            "guidance_scale": EMBEDDED_CFG_SCALE if self.embedded_cfg_scale is None else self.embedded_cfg_scale,
            "batch_size": 1,
        }
        if self.cfg_scale == 1.0:
            return RenderSettings.model_validate(common)
        guided = {"cfg_scale": self.cfg_scale, "negative_prompt": self.neg_prompt or ""}
        return GuidedSettings.model_validate({**common, **guided})

    def _size_problem(self) -> str | None:
        height, width = self.video_size
        most = LARGEST[self.model_resolution]
        if height * width <= most[0] * most[1]:
            return None
        return (
            f"--model-resolution {self.model_resolution} is for videos of up to {most[0]} x {most[1]} pixels, but "
            f"--video-size is {height} {width}; give another of the two"
        )

    def _sampling_problem(self) -> str | None:
        if not self.flow_reverse:
            return (
                "--flow-reverse must be given, because HunyuanVideo removes noise from time 1 to 0 and without it "
                "the sampler would go the other way, into noise; add --flow-reverse"
            )
        if self.neg_prompt is not None and self.cfg_scale == 1.0:
            return "--neg-prompt has an effect with --cfg-scale above 1 only, but that is 1; raise it or leave it out"
        return None

    def _folder_problem(self) -> str | None:
        if self.quantization is None:
            if self.do_save_video:
                return None
            return (
                "a run must leave something, but neither --do_quant nor --do_save_video is given; add --do_save_video "
                "for float videos, or --do_quant for quantized weights"
            )
        weights = self.quantization.quant_weight_save_folder.resolve()
        others = {"quant_dump_calib_folder": self.quantization.quant_dump_calib_folder, "save_path": self.save_path}
        for name, folder in others.items():
            if weights in (folder.resolve(), *folder.resolve().parents):
                return (
                    f"--quant_weight_save_folder must hold weights alone, but {flag(name)} {folder} lies in it; give "
                    "it a folder of its own"
                )
        return None
