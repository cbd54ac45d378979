"""The other end of `pipeline/workers/group.py`: a process that connects back and works off orders, one at a time.

Run by its file, `python -P .../workers/process.py MODULE.py`, also by interpreters that have none of our packages: standard
library only. MODULE.py has a function `make_handler()` that returns `handle(order, report) -> reply`; orders and replies are
JSON, `report(topic, values)` says how far the work is.

A process whose launcher is gone, however it ended, ends as well, with everything it started.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

ADDRESS = "COHORT_LAUNCHER_ADDRESS"
"""Variable with host:port of the launcher."""
KEY = "COHORT_LAUNCHER_KEY"
"""Variable with the secret, in hexadecimal digits, that both sides prove to know."""
RANK = "COHORT_LAUNCHER_RANK"
"""Variable with this process's number in its group."""
ELSEWHERE = "-"
"""Last argument of a process on another host than its launcher's: its environment comes by standard input."""
GRACE = 5.0
"""Seconds that a process has to end by itself once its launcher has hung up."""

Handler = Callable[[dict[str, Any], Callable[[str, dict[str, Any]], None]], Any]


def main(file: str) -> None:
    """Connect, make the handler, say so, and work until the launcher hangs up."""
    connection, hung_up = _connect(), threading.Event()
    atexit.register(_take_along, hung_up)  # the first to be registered runs last
    orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, orders, hung_up), name="orders", daemon=True).start()

    def say(**message: Any) -> None:
        connection.send_bytes(json.dumps(message).encode())

    def report(topic: str, values: dict[str, Any]) -> None:
        say(report=[topic, values])

    handle = _attempt(say, lambda: _load(file)())
    while handle is not None and (order := orders.get()) is not None:
        _attempt(say, lambda order=order: handle(order, report))  # type: ignore[misc]


def _attempt(say: Callable[..., None], work: Callable[[], Any]) -> Any:
    """Do it and send its result, or what was wrong; a handler is returned instead of sent."""
    try:
        result = work()
    except Exception as error:
        traceback.print_exc()
        say(error=str(error), kinds=[kind.__name__ for kind in type(error).__mro__])
        return None
    say(reply=None if callable(result) else result)
    return result


def _connect() -> Connection:
    host, port = os.environ.pop(ADDRESS).rsplit(":", 1)
    key = bytes.fromhex(os.environ.pop(KEY))
    launcher = socket.create_connection((host, int(port)))
    keep_alive(launcher)
    connection = Connection(launcher.detach())
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    connection.send_bytes(json.dumps({"rank": int(os.environ[RANK])}).encode())
    return connection


def keep_alive(connection: socket.socket) -> None:
    """Let the system ask a silent peer whether it is there, so that a host that is gone ends the connection in two minutes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)


def _receive(
    connection: Connection, orders: queue.SimpleQueue[dict[str, Any] | None], hung_up: threading.Event
) -> None:
    """Take orders while the main thread computes; when the launcher is gone, give it time to end, and then end it."""
    try:
        while True:
            orders.put(json.loads(connection.recv_bytes()))
    except (EOFError, OSError):
        hung_up.set()
        orders.put(None)
        time.sleep(GRACE)
        _take_along(hung_up)


def _take_along(hung_up: threading.Event) -> None:
    """Kill this process and everything it started once the launcher is gone."""
    if hung_up.is_set():
        os.killpg(0, signal.SIGKILL)


def _load(file: str) -> Callable[[], Handler]:
    spec = importlib.util.spec_from_file_location("cohort_worker", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    maker: Callable[[], Handler] = module.make_handler
    return maker


def _stand_in() -> int:
    """Start the process in a session on another host than the launcher's, and kill what it leaves behind.

    Its environment comes by standard input, so that no list of processes shows the secret in it. Returns its exit code.
    """
    environment = json.loads(sys.stdin.readline())
    process = subprocess.Popen(
        [sys.executable, "-P", *sys.argv[:2]],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    code = process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    if sys.argv[2:] == [ELSEWHERE]:
        sys.exit(_stand_in())
    main(sys.argv[1])
