"""Quantized weights as a folder: written, loaded and checked.

The folder holds what MindIE-SD loads (one safetensors file with every tensor of the denoiser, one JSON file that
names the algorithm of each) and `hyq_manifest.json`, which says what it is, what it was made from and what every byte
must be.
Format: `docs/export-format.md`.
"""

from hyquant.export.manifest import ExportManifest, ModelInfo, model_info, module_info, read_manifest
from hyquant.export.names import FileNames, default_names, for_rank
from hyquant.export.reader import load_quantized
from hyquant.export.verify import VerifyReport, verify_export
from hyquant.export.writer import require_writable, save_quantized

__all__ = [
    "ExportManifest",
    "FileNames",
    "ModelInfo",
    "VerifyReport",
    "default_names",
    "for_rank",
    "load_quantized",
    "model_info",
    "module_info",
    "read_manifest",
    "require_writable",
    "save_quantized",
    "verify_export",
]
