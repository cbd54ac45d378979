"""Start the process of the local Prefect server detached, identify it beyond its pid, and end it with all it started.

`server.json` in the server's folder records pid, start and port; the environment of the process names the folder. A pid used
again by another program therefore never passes for the server, nor does the server of the folder that this one is a copy
of. A server whose record, or whole folder, was lost is found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import psutil

from pipeline.orchestration import guarded_server

_HOME_MARK: Final = "COHORT_PREFECT_HOME"
_CHECKED_BYTES: Final = 64 * 2**20
_ALL_PAGES: Final = "PRAGMA quick_check(1)"
_DATABASES: Final = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
"""Where the user may name another database than the folder's own."""
_OF_WORKERS: Final = ("COHORT_WORKER", "PREFECT__WORKER_NAME", "PREFECT__WORKER_ID")
"""Variables by which a worker marks its children, which end with it; a server that it starts does not."""
_children: dict[int, subprocess.Popen[bytes]] = {}  # kept so that a dead server of this process is reaped


@dataclasses.dataclass(frozen=True)
class ServerProcess:
    """Identity of a started server, as `server.json` holds it."""

    pid: int
    start: str
    """See `start_of`."""
    port: int
    home: str
    """The folder it serves: another one in the record of a folder that was copied."""

    @property
    def url(self) -> str:
        """Return the address of the API."""
        return f"http://127.0.0.1:{self.port}/api"

    def alive(self) -> bool:
        """Return whether this very process still runs."""
        return is_alive(self.pid, self.start)

    @property
    def age(self) -> float:
        """Return the seconds since it started; 0 where it is gone."""
        with contextlib.suppress(psutil.Error):
            return max(0.0, time.time() - psutil.Process(self.pid).create_time())
        return 0.0


@dataclasses.dataclass(frozen=True)
class RunningServer:
    """A server of this user on this machine, whatever its folder says of it."""

    pid: int
    home: Path
    port: int
    seconds: float
    """Since it started."""
    memory: int
    """Bytes."""


def start_of(pid: int) -> str:
    """Return when a process started: clock ticks since the boot, and which boot; a clock that is set changes neither.

    Where the system has no /proc: seconds since the epoch.

    Raises:
        psutil.NoSuchProcess: it is gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
        return f"{fields[19]}-{boot[:8]}"
    except (OSError, IndexError):
        return f"{psutil.Process(pid).create_time():.0f}"


def is_alive(pid: int, start: str) -> bool:
    """Return whether the process `pid` that started at `start` (see `start_of`) still runs."""
    if pid in _children:
        _children[pid].poll()
    try:
        return start_of(pid) == start and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):
        return False


def password_of(home: Path, *, renew: bool = False) -> str:
    """Return the secret of Prefect's server and its clients, `cohort:...`: the file `password` of the folder, or nothing.

    Args:
        renew: write another one; under the folder's lock.

    Raises:
        OSError: it cannot be read or written.
    """
    file = home / "password"
    if renew:
        draft = home / f"password.{os.getpid()}"
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as sink:
            sink.write(f"cohort:{secrets.token_urlsafe(24)}\n")
        os.replace(draft, file)
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8").strip()
    return ""


def database_fault(home: Path) -> str:
    """Return what is wrong with `prefect.db`, and what to do: a damaged one would fail somewhere inside the server.

    Empty where sqlite can read it, there is none, or another is configured.
    """
    file = home / "prefect.db"
    if not file.exists() or any(os.environ.get(name) for name in _DATABASES):
        return ""
    # The schema always; all pages where that takes no time.
    deep = file.stat().st_size < _CHECKED_BYTES
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=2.0)) as connection:
            found = connection.execute(_ALL_PAGES if deep else "SELECT count(*) FROM sqlite_master").fetchone()[0]
        wrong = str(found) if deep and found != "ok" else ""
    except sqlite3.OperationalError:  # locked, or not to be opened: the server says so
        return ""
    except sqlite3.DatabaseError as error:
        wrong = str(error)
    aside = shlex.join(["mv", str(file), f"{file}.damaged"])
    return wrong and (
        f"{file} is damaged ({wrong}). It holds what Prefect's pages show, no results: move it aside (`{aside}`) and a new one "
        "is made, or use `--engine inline`"
    )


def spawn(
    home: Path, wanted_port: int | None, settings: Mapping[str, str], *, password: str, idle: float
) -> ServerProcess:
    """Start a server in a session of its own and record it.

    Args:
        wanted_port: taken when free (a restarted server keeps its address, so that running flows find it again).
        settings: environment variables on top of this process's own.
        password: what it asks its clients for.
        idle: seconds without a request after which it ends; 0: never.
    """
    port = free_port(wanted_port)
    environment = {
        **os.environ,
        **settings,
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),  # the UI learns its API's address from here, not from --port
        "PREFECT_UI_STATIC_DIRECTORY": str(home / "ui"),
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}",
        guarded_server.IDLE: str(idle),
        _HOME_MARK: str(home),
    }
    for name in ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE", *_OF_WORKERS):
        environment.pop(name, None)
    # -P and cwd: neither modules nor a prefect.toml nor a .env of the caller's folder reach the server.
    command = [sys.executable, "-P", guarded_server.__file__, "prefect", str(port)]
    with open(home / "server.log", "ab") as log:
        child = subprocess.Popen(
            command, cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    _children[child.pid] = child
    process = ServerProcess(child.pid, start_of(child.pid), port, str(home))
    draft = home / f"server.json.{os.getpid()}"
    draft.write_text(json.dumps(dataclasses.asdict(process)), encoding="utf-8")
    os.replace(draft, home / "server.json")
    return process


def recorded(home: Path) -> ServerProcess | None:
    """Return the server started last, dead or alive; None when none was, or the record is damaged or another folder's."""
    try:
        found = json.loads((home / "server.json").read_text(encoding="utf-8"))
        pid, start, port, whose = (found[field.name] for field in dataclasses.fields(ServerProcess))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    numbers = all(type(value) is int for value in (pid, port)) and pid > 0 and 0 < port < 65536
    return ServerProcess(pid, start, port, whose) if numbers and type(start) is str and whose == str(home) else None


def own_processes(home: Path) -> list[psutil.Process]:
    """Return the live servers of this folder, by the mark in their environment."""
    return [process for process, environment in _marked() if environment[_HOME_MARK] == str(home)]


def running_servers() -> list[RunningServer]:
    """Return all servers of this user on this machine."""
    found = []
    for process, environment in _marked():
        with contextlib.suppress(psutil.Error, ValueError):
            port = int(environment.get("PREFECT_SERVER_API_PORT", "0"))
            seconds = max(0.0, time.time() - process.create_time())
            found.append(
                RunningServer(process.pid, Path(environment[_HOME_MARK]), port, seconds, process.memory_info().rss)
            )
    return found


def _marked() -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Yield processes that were started as a server, and their environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # Session leaders only: what else inherited the mark belongs to the leader's group.
            if os.getsid(process.pid) == process.pid and _HOME_MARK in (environment := environment_of(process)):
                yield process, environment


def environment_of(process: Any) -> dict[str, str]:
    """Return the environment that a process was started with; for a moment after `exec` Linux shows none."""
    for _ in range(10):
        if found := process.environ():
            return dict(found)
        time.sleep(0.005)
    return {}


def end(process: psutil.Process) -> None:
    """End a server and whatever it started, by SIGTERM and after 10 s by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(psutil.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, number)
            process.wait(timeout=10.0)
    _children.pop(process.pid, None)


def free_port(wanted: int | None) -> int:
    """Return the wanted port of 127.0.0.1 where it is free, else any free one."""
    for port in (wanted or 0, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")
