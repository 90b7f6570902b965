"""Keeps passwords out of what is logged, stored or shown: the addresses of databases and servers carry them.

postgresql://hyq:secret@db/hyq    ->    postgresql://hyq:***@db/hyq
"""

import re
from collections.abc import Callable

_SCHEME = r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*:/{1,2}"
_USER = re.compile(rf"{_SCHEME}[^:/@]*:|(?<![^:/@])[^:/@]+:(?!/)")
"""What stands before a password and the last @ of a word: scheme://USER: or, without a scheme, USER:."""

_CUT_OFF = re.compile(rf"(?P<before>{_SCHEME}[^:/@\[]+:)(?!\d{{1,5}}(?!\w)|\*+@)(?P<password>.+)")
"""An address that ends within its password; what stands behind a host's colon is a port."""

_QUERY = re.compile(
    r"(?P<before>[?&]\w*(?:pass|pwd|token|secret|key|credential)\w*=)(?P<password>[^&]+)", re.IGNORECASE
)
_SECRET_NAME = re.compile(
    r"(?:(?:^|_)PASS|PASSWORD|PASSWD|PASSPHRASE|PWD|TOKEN|SECRET|KEY|CREDENTIALS?)(?:_|$)", re.IGNORECASE
)


def redacted(text: str) -> str:
    """Return a text in which the password of every URL is three stars; hosts, users and databases stay readable.

    What may be a password is hidden: too much rather than too little.
    """
    return _hidden(text, lambda _: "***")


def blotted(text: str) -> str:
    """Return a text in which every character of the password of a URL is a star; it is as long as before."""
    return _hidden(text, lambda password: "*" * len(password))


def names_a_secret(name: str) -> bool:
    """Say whether the value of a variable of this name is a secret, as that of MLFLOW_TRACKING_PASSWORD."""
    return _SECRET_NAME.search(name) is not None


def _hidden(text: str, hide: Callable[[str], str]) -> str:
    def hidden_in(word: re.Match[str]) -> str:
        user_info, at, rest = word[0].rpartition("@")
        if at and (user := _USER.search(user_info)):
            user_info = user_info[: user.end()] + hide(user_info[user.end() :])
        hidden = user_info + at + rest
        for pattern in (_CUT_OFF, _QUERY):
            hidden = pattern.sub(lambda found: found["before"] + hide(found["password"]), hidden)
        return hidden

    return re.sub(r"\S+", hidden_in, text)
