"""JSON from files that anybody may have written."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return the document in a text.

    Raises:
        ValueError: If it is no JSON in UTF-8, or is nested deeper than Python can read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep to be read") from error
