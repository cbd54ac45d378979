"""Start, find and stop the local Prefect server: one per project, on loopback, unless another one is configured.

Its folder (`home`) holds the database, `password`, `server.json`, `server.lock` and `server.log`. The lock is held for the
milliseconds in which a run looks for a server and starts one, never while it waits, so that runs started together share one.
The server outlives the run that started it, until nothing was asked of it for half an hour (`COHORT_SERVER_IDLE_MINUTES`).

`start_server_soon` returns at once and `ensure_server` waits: the seconds a server needs to import itself (and, the first
time, to create its database) pass during other work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import logging
import math
import os
import sys
import threading
import time
import tomllib
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import psutil

from pipeline.config.text import without_password
from pipeline.orchestration.guarded_server import ALIVE
from pipeline.orchestration.server_process import (
    ServerProcess,
    database_fault,
    end,
    own_processes,
    password_of,
    recorded,
    spawn,
)
from pipeline.store.locks import lock_file

START_SECONDS: Final = 300.0
"""How long a server may take to answer for the first time: slow disks need more than a minute to migrate the database."""
IDLE_MINUTES: Final = 30.0
"""A server ends after so long without a request (runs, workers and open pages send some); see COHORT_SERVER_IDLE_MINUTES."""
HUNG_SECONDS: Final = 20.0
"""A server older than `START_SECONDS` that is silent for so long is killed and started again."""

_ALIVE_SECONDS: Final = 60.0
"""How often a run says that it lives: a long stage sends Prefect nothing."""
_OWN_URL: Final = "COHORT_PREFECT_URL"  # the URL this project put into PREFECT_API_URL; any other is the user's
_QUIET: Final = {
    "DO_NOT_TRACK": "1",
    "PREFECT_CLIENT_MAX_RETRIES": "6",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}
"""Defaults of client and server; what the user has set wins."""


_LOST: Final = ("ConnectError", "ConnectTimeout", "ReadError", "ReadTimeout", "RemoteProtocolError")
"""Errors of httpx, by name: it comes with Prefect and is not imported here."""


class ServerError(RuntimeError):
    """No Prefect server can be reached; says what was tried, where its log lies, and what to do."""


@dataclasses.dataclass(frozen=True)
class ServerStatus:
    """The server of a project."""

    url: str | None
    """API URL; None when none was ever started."""
    pid: int | None
    """Process id of a live server; None when it is dead or is not ours."""
    healthy: bool
    """Whether it answers."""
    configured: bool
    """The user configured it (PREFECT_API_URL or a Prefect profile): it is used, never started or stopped."""
    log: Path
    """What the server printed."""

    @property
    def shown(self) -> str:
        """Return the URL as it may be printed and stored."""
        return without_password(self.url or "")

    @property
    def ui(self) -> str | None:
        """Return the address of the user interface."""
        return self.url.removesuffix("/api") if self.url else None


def ensure_server(home: Path, *, timeout: float = START_SECONDS) -> str:
    """Return the API URL of a server that answers: the user's, the running one, or a new one. Call before importing prefect.

    Sets the environment of this process so that Prefect's client uses that server, quietly.

    Raises:
        ServerError: the configured server does not answer, or none could be started.
    """
    if url := configured_url():
        if not _answers(url, timeout=10.0):
            raise ServerError(
                f"the configured Prefect server {without_password(url)} does not answer; start it,"
                " correct PREFECT_API_URL, or unset it "
                "to let a local server be started. Nothing is lost: the same command continues from the store"
            )
        own = recorded(home.resolve())  # the user named our own server: its password is at hand
        known = {"PREFECT_API_AUTH_STRING": password_of(home.resolve())} if own and own.url == url.rstrip("/") else {}
        _prepare_client({"PREFECT_API_URL": url, **known})
        return url
    home = home.resolve()
    url = _wait(home, timeout)
    _prepare_client(
        {
            "PREFECT_API_URL": url,
            "PREFECT_API_AUTH_STRING": password_of(home),
            _OWN_URL: url,
            "PREFECT_HOME": str(home),
            "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
            "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        }
    )
    return url


def start_server_soon(home: Path) -> bool:
    """Start the project's server, without waiting, unless it runs or another is configured; return whether it was started.

    Raise ServerError where its folder cannot be written, or COHORT_SERVER_IDLE_MINUTES is no number.
    """
    if configured_url() is not None:
        return False
    found = recorded(home.resolve())
    return not (found and found.alive()) and bool(_start(home.resolve()))


def server_status(home: Path) -> ServerStatus:
    """Return whether a server runs, and where; start nothing."""
    home = home.resolve()
    log = home / "server.log"
    if url := configured_url():
        return ServerStatus(url, None, _answers(url, timeout=5.0), True, log)
    found = recorded(home)
    if found is None:
        return ServerStatus(None, None, False, False, log)
    alive = found.alive()
    return ServerStatus(found.url, found.pid if alive else None, alive and _answers(found.url, timeout=5.0), False, log)


def stop_server(home: Path) -> bool:
    """Stop the project's own server, its whole process group; return whether one ran. Its database stays.

    Also where the folder was deleted meanwhile: nothing is made in its place.
    """
    home = home.resolve()
    with _locked(home) if home.is_dir() else contextlib.nullcontext():
        processes = own_processes(home)
        for process in processes:
            end(process)
    return bool(processes)


@contextlib.contextmanager
def keep_server(home: Path, *, every: float = 2.0) -> Iterator[None]:
    """Start the server again, at the same address, whenever it dies inside the block.

    Prefect's client tries again for about two minutes, so a flow survives a killed server.

    Raises:
        ServerError: instead of the client's own error when it lost the server for good.
    """
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(home, done, every), name="prefect-server-watch", daemon=True)
    if configured_url() is None:
        watcher.start()
    try:
        yield
    except Exception as error:
        if type(error).__name__ in _LOST:
            raise ServerError(
                f"the Prefect server {server_status(home).shown} was lost and did not come back "
                f"({without_password(str(error))}). "
                "Nothing is lost: the same command continues from the store"
            ) from error
        raise
    finally:
        done.set()
        if watcher.is_alive():
            watcher.join(timeout=5.0)


def _watch(home: Path, done: threading.Event, every: float) -> None:
    said = time.monotonic()
    while not done.wait(every):
        found = recorded(home.resolve())
        if found and found.alive():
            if time.monotonic() - said > _ALIVE_SECONDS:
                said = time.monotonic()
                _ask(found.url.removesuffix("/api") + ALIVE, timeout=5.0)
            continue
        # A folder that is full must not stop training; the client reports the missing server in its time.
        with contextlib.suppress(ServerError):
            start_server_soon(home)
            warnings.warn("the local Prefect server died and was started again; the run goes on", stacklevel=1)


def configured_url() -> str | None:
    """Return the API URL that the user configured, in the environment or in Prefect's active profile; None: use our own."""
    if url := os.environ.get("PREFECT_API_URL"):
        return None if url == os.environ.get(_OWN_URL) else url
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")).expanduser()
    try:
        profiles: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no profiles, or none that Prefect could read either
        return None
    active = os.environ.get("PREFECT_PROFILE", profiles.get("active", ""))
    url = profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return str(url) if url else None


def _prepare_client(settings: Mapping[str, str]) -> None:
    os.environ.update(settings)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # A lost server is reported once, by `keep_server`; these would print every event that was not sent.
    for name in ("prefect.events.clients", "prefect._internal.concurrency"):
        logging.getLogger(name).addFilter(_mute)  # a level would be reset by Prefect's own logging set-up
    if "prefect.context" in sys.modules:  # imported too early: its settings were read before these
        sys.modules["prefect.context"].refresh_global_settings_context()


def _mute(_record: logging.LogRecord) -> bool:
    return False


def _start(home: Path) -> ServerProcess:
    """Return the live server of `home`, or one that was just started; do not wait for an answer."""
    found = recorded(home)
    if found and found.alive():
        return found
    with _locked(home):
        found = recorded(home)
        if found and found.alive():
            return found
        for orphan in own_processes(home):  # its record was lost
            end(orphan)
        if wrong := database_fault(home):
            raise ServerError(wrong)
        settings = {name: value for name, value in _QUIET.items() if name not in os.environ}
        # Running flows have the password of the server that they lost; a folder without a record of its own may be a copy.
        password = password_of(home, renew=not (found and password_of(home)))
        return spawn(home, found.port if found else None, settings, password=password, idle=60 * _idle_minutes())


def _idle_minutes() -> float:
    given = os.environ.get("COHORT_SERVER_IDLE_MINUTES") or str(IDLE_MINUTES)
    with contextlib.suppress(ValueError):
        if 0 <= float(given) < math.inf:
            return float(given)
    raise ServerError(f"COHORT_SERVER_IDLE_MINUTES: expected minutes (0: never ends by itself), found {given!r}")


def _wait(home: Path, timeout: float) -> str:
    """Return the URL of the server once it answers; replace one that dies or hangs meanwhile."""
    process, began, starts = _start(home), time.monotonic(), 1
    while not _answers(process.url, timeout=2.0):
        silent = time.monotonic() - began
        if silent > HUNG_SECONDS and process.age > START_SECONDS:
            end(psutil.Process(process.pid))
        if not process.alive():
            if starts == 3:
                raise ServerError(f"the local Prefect server does not start; {_last_lines(home)}")
            process, starts = _start(home), starts + 1
        elif silent > timeout:
            raise ServerError(f"the local Prefect server did not answer within {timeout:.0f} s; {_last_lines(home)}")
        else:
            time.sleep(0.1)
    return process.url


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    try:
        home.mkdir(parents=True, exist_ok=True)
        with open(home / "server.lock", "w") as handle:
            lock_file(handle)
            yield
    except OSError as error:
        raise ServerError(
            f"the local Prefect server cannot be started in {home} ({error.strerror or error}); "
            "free space or fix permissions, set PREFECT_API_URL, or use `--engine inline`"
        ) from error


def _answers(url: str, *, timeout: float) -> bool:
    # A server behind a login answers 401 or 403: it is there, and Prefect's client has the key.
    return _ask(f"{url.rstrip('/')}/health", timeout=timeout) in (200, 401, 403)


def _ask(url: str, *, timeout: float) -> int | None:
    """Return the status of a GET; None without an answer."""
    try:
        parts = urllib.parse.urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        with contextlib.closing(kind(parts.hostname or "", parts.port, timeout=timeout)) as connection:
            connection.request("GET", parts.path)
            return connection.getresponse().status
    except (OSError, ValueError, http.client.HTTPException):  # ValueError: a port that is none
        return None


def _last_lines(home: Path) -> str:
    log = home / "server.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:] if log.exists() else []
    return "\n  ".join([f"last lines of {log}:", *lines])
