"""`SessionConfig`: what is done to a model, and with which calls of it as calibration data."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, field_validator, model_validator

from hyquant.config import DeployDtype
from hyquant.session.processors import (
    FA3ProcessorConfig,
    M3ProcessorConfig,
    M4ProcessorConfig,
    M6ProcessorConfig,
    Quantizer,
    SaveProcessorConfig,
    Smoother,
    W8A8DynamicProcessorConfig,
    W8A8ProcessorConfig,
    W8A8TimeStepProcessorConfig,
)
from hyquant.session.records import Calls, read_calls
from hyquant.session.values import SessionValue, hint

QUANTIZERS: Mapping[str, type[Quantizer]] = {
    "w8a8": W8A8ProcessorConfig,
    "w8a8_dynamic": W8A8DynamicProcessorConfig,
    "w8a8_timestep": W8A8TimeStepProcessorConfig,
}
SMOOTHERS: Mapping[str, type[Smoother]] = {"m3": M3ProcessorConfig, "m4": M4ProcessorConfig, "m6": M6ProcessorConfig}
PROCESSORS: Mapping[str, type[SessionValue]] = {
    **SMOOTHERS,
    **QUANTIZERS,
    "fa3": FA3ProcessorConfig,
    "save": SaveProcessorConfig,
}
"""The processors of a session by the key they have in its map; the order of keys means nothing."""


class SessionConfig(SessionValue):
    """A whole session.

    Attributes:
        processor_cfg_map: Configs by key of `PROCESSORS`: one quantizer, at most one smoothing, and at will "fa3" and
            "save".
        calib_data: Calls of the model as `DumperManager` gives them: lists of positional arguments, dictionaries of
            keyword arguments, or dictionaries with "timestep_idx", "args" and "kwargs". May be empty if nothing is
            taken from them: "w8a8_dynamic" alone.
        device: Kind of device the model must be on, such as "cpu" or "npu"; None for wherever it is.
        calibration: "single_pass" observes the float model; "sequential" lets each block see what quantized blocks
            before it give, close to msModelSlim.
        deploy_dtype: Dtype the scales must be exactly representable in; the engine casts them to it.
        disable_last_linear: Leave the last Linear of the model in float, as msModelSlim always does.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    processor_cfg_map: Mapping[str, Any]
    calib_data: list[Any] | None = None
    device: str | None = None
    calibration: Literal["single_pass", "sequential"] = "single_pass"
    deploy_dtype: DeployDtype = "bfloat16"
    disable_last_linear: bool = False

    @field_validator("processor_cfg_map")
    @classmethod
    def _processors_fit(cls, processors: Mapping[str, Any]) -> Mapping[str, Any]:
        for key, config in processors.items():
            if key not in PROCESSORS:
                raise ValueError(
                    f"processor_cfg_map must have keys among {', '.join(PROCESSORS)}, but got {key!r}; "
                    f"{hint(key, list(PROCESSORS))}"
                )
            if type(config) is not PROCESSORS[key]:
                raise ValueError(
                    f"{key!r} of processor_cfg_map must be a {PROCESSORS[key].__name__}, but got a "
                    f"{type(config).__name__}; give {key!r} its own config."
                )
        _require_one("quantizer", [key for key in QUANTIZERS if key in processors])
        if len(smoothers := [key for key in SMOOTHERS if key in processors]) > 1:
            _require_one("smoothing", smoothers)
        return processors

    @model_validator(mode="after")
    def _has_calls(self) -> "SessionConfig":
        calls = self.calls()
        if isinstance(self.quantizer, W8A8TimeStepProcessorConfig) and calls.records and not calls.have_steps:
            raise ValueError(
                "w8a8_timestep must be calibrated with calls that say their step, but calib_data has none; dump it "
                "with DumperManager(model, capture_mode='timestep')."
            )
        if self.needs_calls and not calls.records:
            raise ValueError(
                f"{', '.join(key for key in self.processor_cfg_map if key != 'save')} must be calibrated with calls of "
                "the model, but calib_data is empty; give it a dump of DumperManager."
            )
        return self

    @property
    def quantizer(self) -> Quantizer:
        """Return the config of the one quantizer."""
        return next(self.processor_cfg_map[key] for key in QUANTIZERS if key in self.processor_cfg_map)  # type: ignore[no-any-return]

    @property
    def smoother(self) -> Smoother | None:
        """Return the config of the smoothing, if there is one."""
        return next((self.processor_cfg_map[key] for key in SMOOTHERS if key in self.processor_cfg_map), None)

    @property
    def save(self) -> SaveProcessorConfig | None:
        """Return where to save, if anywhere."""
        return self.processor_cfg_map.get("save")

    @property
    def has_attention(self) -> bool:
        """Say whether attention is quantized."""
        return "fa3" in self.processor_cfg_map

    @property
    def needs_calls(self) -> bool:
        """Say whether anything is taken from calibration data."""
        is_dynamic = isinstance(self.quantizer, W8A8DynamicProcessorConfig)
        return not is_dynamic or self.smoother is not None or self.has_attention

    def calls(self) -> Calls:
        """Return the calibration data as records."""
        return read_calls(self.calib_data or [])


def _require_one(what: str, keys: list[str]) -> None:
    if len(keys) == 1:
        return
    known = QUANTIZERS if what == "quantizer" else SMOOTHERS
    raise ValueError(
        f"processor_cfg_map must have one {what}, but got {' and '.join(keys) or 'none'}; give one of "
        f"{', '.join(known)}."
    )
