"""Keeps passwords out of what is logged, stored or shown: the addresses of databases and servers carry them.

postgresql://hyq:secret@db/hyq    ->    postgresql://hyq:***@db/hyq
"""

import re

_PASSWORD = re.compile(r"(?P<before>\b[A-Za-z][A-Za-z0-9+.-]*://[^\s:/@]*:)(?P<password>\S+)(?=@)")
_QUERY = re.compile(r"(?P<before>[?&]\w*(?:pass|pwd|token|secret|key|credential)\w*=)[^\s&]+", re.IGNORECASE)


def redacted(text: str) -> str:
    """Return a text in which the password of every URL is three stars; hosts, users and databases stay readable.

    What may be a password is hidden: too much rather than too little.
    """
    return _QUERY.sub(r"\g<before>***", _PASSWORD.sub(r"\g<before>***", text))
