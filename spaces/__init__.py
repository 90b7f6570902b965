"""What may be searched, as data, and how a trial becomes a configuration.

    spaces.space    SearchSpace and load_space: strategies, ranges, exclusion sets and presets from YAML
    spaces.suggest  suggest: one trial and one space give one `QuantConfig`
    presets/        the shipped spaces "mini" and "hunyuan_video"

PyPI has another package of this name, so import from the modules (`from spaces.space import load_space`).
"""

DISTRIBUTION = "hyq-search"
