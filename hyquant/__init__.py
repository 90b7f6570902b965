"""Quantize the denoiser of a text-to-video model: decide, calibrate, quantize, export.

    config     QuantConfig         what to do, as a frozen value
    plan       build_plan          what happens to every layer, before anything happens
    record     capture_calls       the calls of any module while a pipeline runs
    calibrate  calibrate, observe  float activations as statistics that merge in any order
    quantize   quantize_, restore_ int8 Linears in place, and the float ones back bit by bit
    export     save_quantized, load_quantized, verify_export
    models     load_model          HunyuanVideo from a folder or the shipped mini weights
    session    quant_model         the same by the calls of msModelSlim's scripts (`docs/migrating.md`)

The names above are loaded when they are first used, so `import hyquant` costs nothing and none of them needs more than
torch, safetensors and pydantic until a model is loaded. Everything else is imported from the module that defines it.
The formulas are in `docs/theory.md`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyquant.calibration.calibrate import calibrate as calibrate
    from hyquant.calibration.calibrate import quantize_calibrated_ as quantize_calibrated_
    from hyquant.calibration.calls import capture_calls as capture_calls
    from hyquant.calibration.observe import observe as observe
    from hyquant.config import QuantConfig as QuantConfig
    from hyquant.export import load_quantized as load_quantized
    from hyquant.export import save_quantized as save_quantized
    from hyquant.export import verify_export as verify_export
    from hyquant.models import load_model as load_model
    from hyquant.plan import build_plan as build_plan
    from hyquant.quantize import quantize_ as quantize_
    from hyquant.quantize import restore_ as restore_
    from hyquant.session.configs import SessionConfig as SessionConfig
    from hyquant.session.dump import DumperManager as DumperManager
    from hyquant.session.layers import get_disable_layer_names as get_disable_layer_names
    from hyquant.session.loading import safe_torch_load as safe_torch_load
    from hyquant.session.processors import FA3ProcessorConfig as FA3ProcessorConfig
    from hyquant.session.processors import M3ProcessorConfig as M3ProcessorConfig
    from hyquant.session.processors import M4ProcessorConfig as M4ProcessorConfig
    from hyquant.session.processors import M6Config as M6Config
    from hyquant.session.processors import M6ProcessorConfig as M6ProcessorConfig
    from hyquant.session.processors import SaveProcessorConfig as SaveProcessorConfig
    from hyquant.session.processors import W8A8DynamicProcessorConfig as W8A8DynamicProcessorConfig
    from hyquant.session.processors import W8A8DynamicQuantConfig as W8A8DynamicQuantConfig
    from hyquant.session.processors import W8A8ProcessorConfig as W8A8ProcessorConfig
    from hyquant.session.processors import W8A8QuantConfig as W8A8QuantConfig
    from hyquant.session.processors import W8A8TimeStepProcessorConfig as W8A8TimeStepProcessorConfig
    from hyquant.session.processors import W8A8TimeStepQuantConfig as W8A8TimeStepQuantConfig
    from hyquant.session.quant import quant_model as quant_model
    from hyquant.session.ranks import get_rank as get_rank
    from hyquant.session.ranks import get_rank_suffix_file as get_rank_suffix_file
    from hyquant.session.timestep import TimestepManager as TimestepManager

DISTRIBUTION = "hyq-search"

_HOMES = {
    "DumperManager": "hyquant.session.dump",
    "FA3ProcessorConfig": "hyquant.session.processors",
    "M3ProcessorConfig": "hyquant.session.processors",
    "M4ProcessorConfig": "hyquant.session.processors",
    "M6Config": "hyquant.session.processors",
    "M6ProcessorConfig": "hyquant.session.processors",
    "QuantConfig": "hyquant.config",
    "SaveProcessorConfig": "hyquant.session.processors",
    "SessionConfig": "hyquant.session.configs",
    "TimestepManager": "hyquant.session.timestep",
    "W8A8DynamicProcessorConfig": "hyquant.session.processors",
    "W8A8DynamicQuantConfig": "hyquant.session.processors",
    "W8A8ProcessorConfig": "hyquant.session.processors",
    "W8A8QuantConfig": "hyquant.session.processors",
    "W8A8TimeStepProcessorConfig": "hyquant.session.processors",
    "W8A8TimeStepQuantConfig": "hyquant.session.processors",
    "build_plan": "hyquant.plan",
    "calibrate": "hyquant.calibration.calibrate",
    "capture_calls": "hyquant.calibration.calls",
    "get_disable_layer_names": "hyquant.session.layers",
    "get_rank": "hyquant.session.ranks",
    "get_rank_suffix_file": "hyquant.session.ranks",
    "load_model": "hyquant.models",
    "load_quantized": "hyquant.export",
    "observe": "hyquant.calibration.observe",
    "quant_model": "hyquant.session.quant",
    "quantize_": "hyquant.quantize",
    "quantize_calibrated_": "hyquant.calibration.calibrate",
    "restore_": "hyquant.quantize",
    "safe_torch_load": "hyquant.session.loading",
    "save_quantized": "hyquant.export",
    "verify_export": "hyquant.export",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hyquant' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted((*globals(), *_HOMES))
