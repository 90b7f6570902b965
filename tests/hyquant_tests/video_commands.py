"""The seed's launch commands, with paths, sizes and ranks of a test in place of its own."""

from pathlib import Path

import av
import torch

from tools.export_original_layout import MODEL

SHORT = "a red circle moving left on a black background"
PROMPTS = ("a cyan circle moving right on a white background", "a green cross standing still on a gray background")

WAYS = {
    "timestep": ("--quant_type", "w8a8_timestep"),
    "fa3": ("--quant_type", "w8a8_dynamic_fa3"),
    "m4": ("--quant_type", "w8a8_dynamic", "--anti_method", "m4"),
}
"""How the three commands of the document end."""


def model_flags(base: Path) -> list[str]:
    return [
        *("--model-base", str(base)),
        *("--dit-weight", str(base / MODEL / "transformers" / "mp_rank_00_model_states.pt")),
        *("--vae-path", str(base / MODEL / "vae")),
        *("--text-encoder-path", str(base / "text_encoder")),
        *("--text-encoder-2-path", str(base / "text_encoder_2")),
    ]


def clip_flags(prompt: str, *, steps: int = 2) -> list[str]:
    return [
        *("--model-resolution", "720p", "--video-size", "32", "32", "--video-length", "5"),
        *("--infer-steps", str(steps), "--prompt", prompt, "--seed", "42", "--flow-reverse"),
    ]


def launch(base: Path, prompts: Path, out: Path, way: str, *, ulysses: int = 1, ring: int = 1) -> list[str]:
    """Return the words of one of the seed's commands after `-m hyquant.sample_video`, in the document's order."""
    return [
        *model_flags(base),
        *clip_flags(str(prompts), steps=4),
        *("--ulysses-degree", str(ulysses), "--ring-degree", str(ring), "--vae-parallel", "--num-videos", "1"),
        *("--save-path", str(out), "--do_quant"),
        *("--quant_weight_save_folder", str(out / "quant" / "safetensors")),
        *("--quant_dump_calib_folder", str(out / "quant" / "cache")),
        *WAYS[way],
    ]


def write_prompts(folder: Path, prompts: tuple[str, ...] = PROMPTS) -> Path:
    path = folder / "calib_prompts.txt"
    path.write_text("\n\n".join(prompts) + "\n")
    path.chmod(0o640)
    return path


def frames(path: Path) -> torch.Tensor:
    """Return a video file as uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])
