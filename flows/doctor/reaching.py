"""Whether something answers at an address: no proxies, no redirects, one attempt."""

from __future__ import annotations

import contextlib
import http.client
import socket
import urllib.parse

__all__ = ["accepts", "status_of"]

_SECONDS = 5.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}


def status_of(url: str, path: str) -> int | None:
    """The HTTP status of `path` below an address; None when nothing answers."""
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with (
        contextlib.suppress(OSError, ValueError, http.client.HTTPException),
        contextlib.closing(kind(parts.hostname or "", parts.port, timeout=_SECONDS)) as connection,
    ):
        connection.request("GET", f"{parts.path.rstrip('/')}{path}")
        return connection.getresponse().status
    return None


def accepts(url: str) -> bool | None:
    """Whether something listens at the host and port of a URL; None when it names none, or none is known for its scheme."""
    parts = urllib.parse.urlsplit(url)
    with contextlib.suppress(ValueError):
        port = parts.port or _PORTS.get(parts.scheme.split("+")[0])
        if not parts.hostname or port is None:
            return None
        with contextlib.suppress(OSError), socket.create_connection((parts.hostname, port), timeout=_SECONDS):
            return True
    return False
