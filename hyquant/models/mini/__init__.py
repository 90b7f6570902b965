"""Where the shipped mini model lies and how its pipeline must be called; imports nothing heavy.

The mini model is a HunyuanVideo of real classes at small size, trained on captioned clips of one moving shape; the
model card `MODEL_CARD.md` beside this file tells what it can do and how that was measured. It obeys its prompts only
with the template and the sequence length given here: other values run without an error and give garbage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_HERE = Path(__file__).parent

WEIGHTS: Final = _HERE / "weights"
"""Folder in the standard diffusers layout, for `HunyuanVideoPipeline.from_pretrained`."""

PROMPTS: Final = {name: _HERE / "prompts" / f"{name}.txt" for name in ("calibration", "search", "heldout")}
"""Three disjoint prompt files, one prompt a line; `heldout` holds combinations that the model never saw in training."""

OUTLIERS: Final = _HERE / "outliers.json"
"""Synthetic outlier factors of the variant `mini-outliers`; see `outliers.py`."""

PROMPT_TEMPLATE: Final[dict[str, str | int]] = {"template": "<bos> describe the video {} <eot>", "crop_start": 4}
"""The pipeline's `prompt_template`; the caption takes the place of the braces."""

MAX_SEQUENCE_LENGTH: Final = 16
"""The pipeline's `max_sequence_length`, in tokens."""
