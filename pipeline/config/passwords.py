"""Remove the passwords of URLs from texts, for logs, records and error messages."""

from __future__ import annotations

import re
from typing import Final

_SECRETS: Final = "passw(?:or)?d|pwd|secret|token|api_?key|access_?key|signature|credential"
_PASSWORDS: Final = (
    re.compile(r"([A-Za-z][\w+.-]*://[^:/@\s]*:)(\S+)(?=@)"),
    re.compile(r"(https?://)([^:/@?#\s]+)(?=@)"),
    re.compile(rf"(?i)([?&;][\w-]*(?:{_SECRETS})[\w-]*=)([^&;\s]+)"),
)
"""Where a URL may have one: before the host (for HTTP also a token without a user), and among the options."""


def without_password(text: str) -> str:
    """Return a URI, or a text with URIs, as it may be stored and printed; the same for every password."""
    for place in _PASSWORDS:
        text = place.sub(r"\1***", text)
    return text


def unspoken(text: str, uri: str) -> str:
    """Return a text, such as an error, without the password of a URI."""
    for found in (place.search(uri) for place in _PASSWORDS):
        text = text.replace(found[2], "***") if found else text
    return text
