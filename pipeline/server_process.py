"""The process of the local Prefect server: started detached, identified beyond its pid, ended with all it started.

`server.json` in the server's folder records pid, start time and port; the environment of the process names the folder.
A pid used again by another program therefore never passes for the server, and a server whose record was lost is found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

__all__ = ["ServerProcess", "end", "is_alive", "own_processes", "recorded", "spawn"]

_HOME_MARK: Final = "COHORT_PREFECT_HOME"
_OF_WORKERS: Final = ("COHORT_WORKER", "PREFECT__WORKER_NAME", "PREFECT__WORKER_ID")
"""What a worker marks its children with, who end with it; a server that it starts does not."""
_children: dict[int, subprocess.Popen[bytes]] = {}  # kept so that a dead server of this process is reaped


@dataclasses.dataclass(frozen=True)
class ServerProcess:
    """Identity of a started server, as `server.json` holds it."""

    pid: int
    created: float
    """Start time of the process, seconds since the epoch."""
    port: int

    @property
    def url(self) -> str:
        """Address of the API."""
        return f"http://127.0.0.1:{self.port}/api"

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return is_alive(self.pid, self.created)


def is_alive(pid: int, created: float) -> bool:
    """Whether the process `pid` that was created at `created` (seconds since the epoch) still runs."""
    if pid in _children:
        _children[pid].poll()
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 1.5 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def spawn(home: Path, wanted_port: int | None, settings: Mapping[str, str]) -> ServerProcess:
    """Start a server in a session of its own and record it.

    Args:
        wanted_port: taken when free (a restarted server keeps its address, so that running flows find it again).
        settings: environment variables on top of this process's own.
    """
    port = _free_port(wanted_port)
    environment = {
        **os.environ,
        **settings,
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),  # the UI learns its API's address from here, not from --port
        "PREFECT_UI_STATIC_DIRECTORY": str(home / "ui"),
        _HOME_MARK: str(home),
    }
    for name in ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_PROFILE", *_OF_WORKERS):
        environment.pop(name, None)
    # -P and cwd: neither modules nor a prefect.toml nor a .env of the caller's folder reach the server.
    command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with open(home / "server.log", "ab") as log:
        child = subprocess.Popen(
            command, cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    _children[child.pid] = child
    process = ServerProcess(child.pid, psutil.Process(child.pid).create_time(), port)
    draft = home / f"server.json.{os.getpid()}"
    draft.write_text(json.dumps(dataclasses.asdict(process)), encoding="utf-8")
    os.replace(draft, home / "server.json")
    return process


def recorded(home: Path) -> ServerProcess | None:
    """The server that was started last, dead or alive; None when none was, or when the record is damaged."""
    try:
        return ServerProcess(**json.loads((home / "server.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def own_processes(home: Path) -> list[psutil.Process]:
    """Live servers of this folder, by the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # Session leaders only: what else inherited the mark belongs to the leader's group.
            if os.getsid(process.pid) == process.pid and process.environ().get(_HOME_MARK) == str(home):
                found.append(process)
    return found


def end(process: psutil.Process) -> None:
    """End a server and whatever it started: asked first, killed after 10 s."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(psutil.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, number)
            process.wait(timeout=10.0)
    _children.pop(process.pid, None)


def _free_port(wanted: int | None) -> int:
    for port in (wanted or 0, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")
