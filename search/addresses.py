"""Addresses of databases and servers: read alike by everything that reads them, or refused."""

from urllib.parse import urlsplit

from search.errors import StoreError
from search.redaction import redacted


def require_plain_address(address: str) -> None:
    """Refuse an address whose password a reader may take for a part of the host, and show as such.

    Raises:
        StoreError: If the password has a character with a meaning of its own, or the port is no number.
    """
    if not _is_plain(address):
        raise StoreError(
            "an address must be SCHEME://USER:PASSWORD@HOST:PORT/NAME with a number as PORT and @ : / ? # [ ] and "
            "blanks in a password written as %40 %3A %2F %3F %23 %5B %5D %20, but got "
            f"{redacted(''.join(address.split()))}; correct it"
        )


def _is_plain(address: str) -> bool:
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises if it is no number
    except ValueError:
        return False
    rest = parts.path + parts.query + parts.fragment
    is_one_word = len(address.split()) == 1
    return not parts.netloc or (is_one_word and parts.netloc.count("@") <= 1 and "@" not in rest)
