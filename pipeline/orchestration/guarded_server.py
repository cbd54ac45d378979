"""Serve Prefect and MLflow for this machine only: `python -P guarded_server.py prefect|mlflow PORT`, run by its file.

A page in a browser can send requests to 127.0.0.1, also under a name of its own that resolves to it. Therefore `Guard` is in
front of both applications: requests name this machine as their host, come from no other page, and carry JSON. Prefect itself
asks for the password of the folder (`PREFECT_SERVER_API_AUTH_STRING`) and for CSRF tokens. MLflow's server would read any
folder of this user that a request names as the place of artifacts; a request may name only those of the project.

The process ends when nothing was asked of it for a while, when its folder (the working directory) is gone, or, MLflow's, with
the command that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import urllib.parse
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

ALIVE = "/cohort/alive"
"""Path that a run requests, so that its server does not end during a long stage."""
IDLE = "COHORT_SERVER_IDLE"
"""Variable with the seconds without a request after which the server ends; 0: never."""
_PROBES = ("/api/health", "/api/ready", "/health")
"""Paths whose requests keep no server alive: `cohort doctor` and every search for a server send them."""
_NAMES = ("127.0.0.1", "localhost", "[::1]")
_PLACES = ("artifactlocation", "artifacturi", "source")
"""Names of fields and tags that say where MLflow's artifacts lie, in lower case without `_`."""
_OWN_SCHEMES = ("cohort", "runs", "models", "mlflow-artifacts")
"""Of sources that name something in MLflow or in a store, no folder."""
_BODY_BYTES = 64 * 2**20
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 10.0

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application that refuses what a foreign page can send, and knows when it was last used."""

    def __init__(self, app: App, *, artifacts: str | None = None) -> None:
        """Guard `app`; with `artifacts`, a URI, no request may name another place for MLflow's artifacts."""
        self._app = app
        self._artifacts = artifacts
        self._last = time.monotonic()
        self._open = 0

    @property
    def idle(self) -> float:
        """Return the seconds since the last request ended; 0 while one is open (a web socket of a run or of a page)."""
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
            if self._artifacts is not None and scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
                body, receive = await _read(receive)
                place = None if body is None else foreign_place(body, self._artifacts)
                if body is None or place is not None:
                    reason = (
                        "the body is too large" if body is None else f"{place} is no place of this project's artifacts"
                    )
                    await _refuse(scope, send, 413 if body is None else 403, reason)
                    return
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            self._last = time.monotonic()


def refusal(scope: Message) -> tuple[int, str] | None:
    """Return status and reason where a request is not one of this machine's; None: it is let in.

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


def foreign_place(body: bytes, artifacts: str) -> str | None:
    """Return the first place of artifacts in a JSON body that is not under the URI `artifacts`; None: there is none."""
    try:
        document = json.loads(body or b"null")
    except (ValueError, RecursionError):
        return None  # MLflow reads nothing from it either
    waiting = [document]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
            fields = [*part.items(), (part.get("key"), part.get("value"))]  # tags are pairs
            for name, value in fields:
                plain = str(name).rpartition(".")[2].replace("_", "").lower()
                if plain in _PLACES and isinstance(value, str) and value and not _is_under(value, artifacts):
                    return value
    return None


def _is_under(place: str, artifacts: str) -> bool:
    """Return whether a URI or a path is the folder `artifacts` or in it."""
    here, there = urllib.parse.urlsplit(place), urllib.parse.urlsplit(artifacts)
    if here.scheme in _OWN_SCHEMES:
        return True
    if here.scheme in ("", "file") and there.scheme in ("", "file"):
        paths = [os.path.realpath(urllib.parse.unquote(part.path)) for part in (here, there)]
        return here.netloc in ("", "localhost") and os.path.commonpath(paths) == paths[1]
    inside = f"{place}/".startswith(f"{artifacts.rstrip('/')}/")
    return inside and ".." not in urllib.parse.unquote(here.path).split("/")


async def _read(receive: Receive) -> tuple[bytes | None, Receive]:
    """Return the body of a request, None where it is too large, and a `receive` that hands it on."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = bool(message.get("more_body")) and message["type"] == "http.request"
        if len(body) > _BODY_BYTES:
            return None, receive
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return given.pop() if given else await receive()

    return body, again


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
    """End this process once it is idle for longer than `limit`, or its folder is gone: by SIGTERM, then at once."""
    before = _identity(folder) or (0, 0)
    while _identity(folder) == before and not 0 < limit < guard.idle:
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


def _prefect() -> Guard:
    from prefect.server.api.server import create_app

    return Guard(create_app(final=True))


def _mlflow() -> Guard:
    """Return MLflow's application on the database and with the artifacts that the environment names, as `mlflow server`."""
    from mlflow.server.constants import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR
    from mlflow.server.handlers import initialize_backend_stores

    uri, artifacts = os.environ["MLFLOW_BACKEND_STORE_URI"], os.environ["MLFLOW_DEFAULT_ARTIFACT_ROOT"]
    os.environ |= {BACKEND_STORE_URI_ENV_VAR: uri, ARTIFACT_ROOT_ENV_VAR: artifacts, "_MLFLOW_SGI_NAME": "uvicorn"}
    initialize_backend_stores(uri, uri, artifacts)
    from mlflow.server.fastapi_app import app

    return Guard(app, artifacts=artifacts)


def _end_with(parent: int) -> None:
    """End this process once the one that started it is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(0)


def main(kind: str, port: int) -> None:
    """Serve on 127.0.0.1 until a signal, the end of use, of the folder, or of the command that started it."""
    if kind == "mlflow":
        threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
    import uvicorn

    guard = _mlflow() if kind == "mlflow" else _prefect()
    watcher = (guard, Path.cwd(), float(os.environ.get(IDLE, "0")) if kind == "prefect" else 0.0)
    threading.Thread(target=_watch, args=watcher, name="idle", daemon=True).start()
    level = os.environ.get("PREFECT_SERVER_LOGGING_LEVEL", "warning").lower()
    uvicorn.run(guard, host="127.0.0.1", port=port, log_level=level, timeout_keep_alive=5)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
