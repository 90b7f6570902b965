"""Keeps passwords out of what is logged, stored or shown: the addresses of databases and servers carry them.

postgresql://hyq:secret@db/hyq    ->    postgresql://hyq:***@db/hyq
"""

import re

_PASSWORD = re.compile(r"(?P<before>\b[A-Za-z][A-Za-z0-9+.-]*://[^\s:/@]*:)(?P<password>[^\s/]+)(?=@)")
_QUERY = re.compile(r"(?P<before>[?&](?:password|passwd|pwd|token|sslpassword)=)[^\s&]+", re.IGNORECASE)


def redacted(text: str) -> str:
    """Return a text in which the password of every URL is three stars; hosts, users and databases stay readable."""
    return _QUERY.sub(r"\g<before>***", _PASSWORD.sub(r"\g<before>***", text))
