"""How an export is loaded, as Python lines to paste: by this library, and by MindIE-SD.

Source of the second: the README and the sources of MindIE-SD 3.1 (`quantize`, `TimestepPolicyConfig`,
`TimestepManager`).
"""

from pathlib import Path

from hyquant.export import ExportManifest
from hyquant.export.layout import description_name


def hyquant_snippet(folder: Path, manifest: ExportManifest) -> str:
    """Return the lines that load an export with this library."""
    model = manifest.model
    lines = (
        "from hyquant.export import load_quantized",
        "from hyquant.models import load_model",
        f"model = load_model({model.kind!r}, {model.source!r}, dtype={model.dtype!r})",
        f"load_quantized(model.denoiser, {str(folder)!r}, model.clock)",
    )
    return "\n".join(lines)


def mindie_snippet(folder: Path, manifest: ExportManifest) -> str | None:
    """Return the lines that load an export into the transformer of the original code; None for diffusers names.

    MindIE-SD is dynamic at every step unless it is told which steps use the stored ranges, so the lines say so.
    """
    if manifest.layout == "diffusers":
        return None
    description = folder / description_name(manifest.model_quant_type)
    dtype = "torch.float16" if manifest.config.deploy_dtype == "float16" else "torch.bfloat16"
    steps = manifest.static_steps if manifest.model_quant_type == "W8A8_TIMESTEP" else None
    if steps is None:
        return "\n".join(
            (
                "import torch",
                "from mindiesd import quantize",
                f"transformer = quantize(transformer, {str(description)!r}, dtype={dtype})",
            )
        )
    return "\n".join(
        (
            "import torch",
            "from mindiesd import TimestepManager, TimestepPolicyConfig, quantize",
            "policy = TimestepPolicyConfig()",
            f'policy.register(range({steps[0]}, {steps[1]}), "static", "w8a8_static_linear")',
            f"transformer = quantize(transformer, {str(description)!r}, dtype={dtype}, timestep_config=policy)",
            "# before every denoising step: TimestepManager.set_timestep_idx(step_index)",
        )
    )
