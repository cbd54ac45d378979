"""Prefect's server for this machine alone: `python -P .../guarded_server.py PORT`, run by its file in the server's folder.

A page in a browser can send requests to 127.0.0.1, also under a name of its own that it lets point there. In front of Prefect's
application stands therefore `Guard`: requests name this machine as their host, come from no other page, and carry JSON.
Prefect itself asks for the password of the folder (`PREFECT_SERVER_API_AUTH_STRING`) and for CSRF tokens.

The process ends when nothing was asked of it for a while, or when its folder is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

__all__ = ["ALIVE", "IDLE", "Guard", "refusal"]

ALIVE = "/cohort/alive"
"""Path that a run asks for, so that its server does not take a long stage for the end of all work."""
IDLE = "COHORT_SERVER_IDLE"
"""Variable with the seconds without a request after which the server ends; 0: never."""
_PROBES = ("/api/health", "/api/ready", "/health")
"""Questions that keep no server alive: `cohort doctor` and every look for a server ask them."""
_NAMES = ("127.0.0.1", "localhost", "[::1]")
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 10.0

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application that refuses what a foreign page can send, and knows when it was last used."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._last = time.monotonic()
        self._open = 0

    @property
    def idle(self) -> float:
        """Seconds since the last request ended; 0 while one is open (a web socket of a run or of a page)."""
        return 0.0 if self._open else time.monotonic() - self._last

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refused = refusal(scope)
        if refused is not None:
            await _refuse(scope, send, *refused)
        elif scope["path"] in _PROBES:
            await self._app(scope, receive, send)
        elif scope["path"] == ALIVE:
            self._last = time.monotonic()
            await _answer(send, 204, b"")
        else:
            await self._use(scope, receive, send)

    async def _use(self, scope: Message, receive: Receive, send: Send) -> None:
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            self._last = time.monotonic()


def refusal(scope: Message) -> tuple[int, str] | None:
    """Status and reason where a request is not one of this machine's; None: it is let in.

    Browsers send `Origin` with whatever changes something, and `text/plain`, forms or nothing where a page may not send JSON.
    """
    headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
    given = dict(headers)
    host = given.get("host", "")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if [header for header, _ in headers].count("host") != 1 or name not in _NAMES:
        return 403, "the Host is not this machine's loopback interface"
    origin = given.get("origin")
    if origin is not None and origin != f"http://{host}":
        return 403, "the Origin is another page's"
    kind = given.get("content-type", "").partition(";")[0].strip().lower()
    body = given.get("content-length", "0") != "0" or "transfer-encoding" in given
    if scope["type"] == "http" and body and kind != "application/json":
        return 415, "the body is not application/json"
    return None


async def _refuse(scope: Message, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    await _answer(send, status, json.dumps({"detail": f"refused: {reason}"}).encode())


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json")] if body else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _watch(guard: Guard, folder: Path, limit: float) -> None:
    """End this process once it is idle for longer than `limit`, or its folder is gone: asked first, then at once."""
    device, number = _identity(folder) or (0, 0)
    while _identity(folder) == (device, number) and not 0 < limit < guard.idle:
        time.sleep(_LOOK_SECONDS)
    print(f"the server ends: {'nothing was asked of it' if _identity(folder) else 'its folder is gone'}", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(0)


def _identity(folder: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = folder.stat()
        return found.st_dev, found.st_ino
    return None


def main(port: int) -> None:
    """Serve Prefect's application on 127.0.0.1 until a signal, the end of use, or the end of the folder."""
    import uvicorn
    from prefect.server.api.server import create_app

    guard = Guard(create_app(final=True))
    watcher = (guard, Path.cwd(), float(os.environ.get(IDLE, "0")))
    threading.Thread(target=_watch, args=watcher, name="idle", daemon=True).start()
    level = os.environ.get("PREFECT_SERVER_LOGGING_LEVEL", "warning").lower()
    uvicorn.run(guard, host="127.0.0.1", port=port, log_level=level, timeout_keep_alive=5)


if __name__ == "__main__":
    main(int(sys.argv[1]))
