"""Quantize the denoiser of a text-to-video model: decide, calibrate, quantize, export.

    config     QuantConfig         what to do, as a frozen value
    plan       build_plan          what happens to every layer, before anything happens
    record     capture_calls       the calls of any module while a pipeline runs
    calibrate  calibrate, observe  float activations as statistics that merge in any order
    quantize   quantize_, restore_ int8 Linears in place, and the float ones back bit by bit
    export     save_quantized, load_quantized, verify_export
    models     load_model          HunyuanVideo from a folder or the shipped mini weights

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

DISTRIBUTION = "hyq-search"

_HOMES = {
    "QuantConfig": "hyquant.config",
    "build_plan": "hyquant.plan",
    "calibrate": "hyquant.calibration.calibrate",
    "capture_calls": "hyquant.calibration.calls",
    "load_model": "hyquant.models",
    "load_quantized": "hyquant.export",
    "observe": "hyquant.calibration.observe",
    "quantize_": "hyquant.quantize",
    "quantize_calibrated_": "hyquant.calibration.calibrate",
    "restore_": "hyquant.quantize",
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
