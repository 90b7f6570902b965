"""Inputs of a denoiser that its dtype cannot hold: they move every video, and look like damage where one side has
others.
"""

import torch

from hyquant.models.sampling import guidance_input, is_guidance_exact, nearest_exact_guidance
from search.study import StudyConfig


def guidance_note(config: StudyConfig) -> str | None:
    """Return in one sentence that a study's guidance is rounded, and the ways out; None if it is not, or on purpose.

    Models in float32 hold every guidance that people write.
    """
    settings = config.workload.settings
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    scale = settings.guidance_scale
    if settings.round_inputs or is_guidance_exact(scale, dtype):
        return None
    rounded = guidance_input(scale, 1, dtype=dtype, device=torch.device("cpu")).item()
    return (
        f"guidance_scale {scale:g} times 1000 should be {scale * 1000:g}, but {config.model.dtype} makes it "
        f"{rounded:g}: videos of another dtype differ by that alone; take {nearest_exact_guidance(scale, dtype):g}, "
        "which is exact, or workload.settings.round_inputs: true, which rounds guidance and timesteps to bfloat16 "
        "wherever this is rendered"
    )
