"""Does the video show what the prompt says? Mean cosine of view and prompt embeddings.

Source: CLIPScore (arXiv:2104.08718), section 3, without its factor and its clamp at 0, averaged over the views.
"""

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder


def clip_prompt(sample: Sample, embedder: Embedder) -> float:
    """Return the mean over views of the cosine between a view of the video and the prompt, in [-1, 1]."""
    views_VE = embedder.embed_video(sample.video)
    prompt_1E = embedder.embed_prompts([sample.prompt])
    return float((views_VE @ prompt_1E.T).mean())


CLIP_PROMPT = MetricSpec(
    name="clip_prompt",
    direction="maximize",
    unit="cosine",
    range=(-1.0, 1.0),
    needs=("video", "prompt", "embedder"),
    looks_at="mean cosine of views and prompt",
    blind_to="Texture, flicker and small motion, and whatever the judge's preprocessing crops away.",
    cost="the judge's",
    function=clip_prompt,
)
