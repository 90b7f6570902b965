"""The errors metrics raises on purpose.

    MetricError           a metric or a sample breaks a rule (also a ValueError)
    ├── EmbedderMissing   the model that embeds videos and prompts, or its weights, are not there
    └── WeightsMissing    the published weights of a metric are not there, or are not the published ones

Every message is one sentence with three parts: the rule, the values, the way out.
"""

import difflib
from collections.abc import Iterable


class MetricError(ValueError):
    """A metric name, a sample or a metric from an entry point breaks a rule."""


class EmbedderMissing(MetricError):
    """An embedding model is unknown, or its weights are not on this machine."""


class WeightsMissing(MetricError):
    """The published weights that a metric reads are not on this machine, or their digest is another one."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error sentence: the closest known name as a question, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
