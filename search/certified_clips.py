"""Clips that certificates were given for. A cache keeps them: other software renders others, so none can be made again.

certified-DIGEST    a clip of an export; its JSON names the prompt and the key of the float clip that it is judged by
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import JsonValue

from hyquant.json_text import parse_json

CERTIFIED = "certified-"
"""How the keys of an export's clips begin."""

_FLOAT_KEY = "float_key"


def about_clip(prompt: str, float_key: str) -> dict[str, JsonValue]:
    """Return what a cache keeps beside an export's clip."""
    return {"prompt": prompt, _FLOAT_KEY: float_key}


def judged_by(cache: Path) -> Iterator[str]:
    """Yield the keys of the float clips by which exports were judged; of damaged entries nothing is known."""
    for path in cache.glob(f"{CERTIFIED}*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            yield str(parse_json(path.read_bytes())["meta"][_FLOAT_KEY])
