"""How an export is loaded, as Python lines to paste: by this library, and by MindIE-SD.

Source of the second: the README and the sources of MindIE-SD 3.1 (`quantize`, `TimestepPolicyConfig`,
`TimestepManager`).
"""

from pathlib import Path

from hyquant.config import QuantConfig
from hyquant.export.manifest import ExportManifest, Layout
from hyquant.export.names import FileNames


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
    """Return the lines that load an export in MindIE-SD from where it lies; None if that cannot load it."""
    return None if manifest.loader is None else f"export_dir = {str(folder)!r}\n{manifest.loader}"


def mindie_loader(
    names: FileNames, config: QuantConfig, *, layout: Layout, quant_type: str, static_steps: tuple[int, int] | None
) -> str | None:
    """Return the lines that load an export into the transformer of the original code; None if that cannot load it.

    It has other names than an export in those of diffusers, and MindIE-SD runs in bfloat16 or float16 alone.

    MindIE-SD is dynamic at every step unless it is told which steps use the stored ranges, so the lines say so. They
    leave the folder open: `export_dir`.
    """
    if layout == "diffusers" or config.deploy_dtype == "float32":
        return None
    description = f'f"{{export_dir}}/{names.description}"'
    dtype = "torch.float16" if config.deploy_dtype == "float16" else "torch.bfloat16"
    steps = static_steps if quant_type == "W8A8_TIMESTEP" else None
    if steps is None:
        return "\n".join(
            (
                "import torch",
                "from mindiesd import quantize",
                f"transformer = quantize(transformer, {description}, dtype={dtype})",
            )
        )
    return "\n".join(
        (
            "import torch",
            "from mindiesd import TimestepManager, TimestepPolicyConfig, quantize",
            "policy = TimestepPolicyConfig()",
            f'policy.register(range({steps[0]}, {steps[1]}), "static", "w8a8_static_linear")',
            f"transformer = quantize(transformer, {description}, dtype={dtype}, timestep_config=policy)",
            "# before every denoising step: TimestepManager.set_timestep_idx(step_index)",
        )
    )
