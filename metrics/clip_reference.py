"""Does the video mean the same as the float video? Mean cosine of the embeddings of corresponding views."""

from metrics.base import MetricSpec, Sample
from metrics.embedders import Embedder


def clip_reference(sample: Sample, embedder: Embedder) -> float:
    """Return the mean over views of the cosine between a view and the same view of the reference, in [-1, 1]."""
    views_VE = embedder.embed_video(sample.video)
    references_VE = embedder.embed_video(sample.reference)
    return float((views_VE * references_VE).sum(dim=1).mean())


CLIP_REFERENCE = MetricSpec(
    name="clip_reference",
    direction="maximize",
    unit="cosine",
    range=(-1.0, 1.0),
    needs=("video", "reference", "embedder"),
    looks_at="mean cosine of views and the same views of the float video",
    blind_to="Damage finer than an image embedding resolves, such as grain and flicker; flaws of the reference itself.",
    cost="the judge's",
    function=clip_reference,
    of_itself=1.0,
)
