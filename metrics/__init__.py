"""Scores of rendered videos: tensors and strings in, numbers out. Imports none of the other packages.

    metrics.registry    METRICS, the table; find_metric; the entry point group "hyq.metrics"
    metrics.score       score_samples: samples and metric names in, values per sample out
    metrics.embedders   load_embedder: the CLIP model that judges, shipped or published
    metrics.statistics  what scores of a few prompts say about all: intervals, tests against a margin, sample sizes
    metrics.base        Sample and MetricSpec, what a metric gets and what it says about itself

PyPI has another package of this name, so import from the modules (`from metrics.score import score_samples`).
"""

DISTRIBUTION = "hyq-search"
