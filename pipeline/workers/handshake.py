"""The launcher's side of a meeting: who connects proves to know the group's key, and nobody else is listened to.

Each connection is greeted in a thread of its own, so that one that says nothing, or says it slowly, holds up nobody.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Final

from pipeline.workers.process import keep_alive

__all__ = ["meet"]

_PATIENCE: Final = 30.0
"""Seconds in which a connection must have proved who it is; the processes that we started take milliseconds."""
_TICK: Final = 0.02
"""Seconds between two looks at who has proved it."""


def meet(server: socket.socket, key: bytes, count: int, look: Callable[[Sequence[int]], None]) -> list[Connection]:
    """One connection for each of `count` processes, by the ranks 0 .. count - 1 that they say they have.

    Args:
        key: the secret that both sides prove to know, by HMAC, without showing it.
        look: called again and again with the ranks that are missing; what it raises ends the meeting.
    """
    found: dict[int, Connection] = {}
    guests: list[tuple[socket.socket, float]] = []
    server.settimeout(_TICK)
    try:
        while missing := [rank for rank in range(count) if rank not in found]:
            look(missing)
            with contextlib.suppress(TimeoutError, ConnectionAbortedError):
                guest, _ = server.accept()
                keep_alive(guest)
                guests.append((guest, time.monotonic() + _PATIENCE))
                threading.Thread(target=_greet, args=(guest, key, found), name="greeting", daemon=True).start()
            late = [guest for guest, end in guests if time.monotonic() > end]
            _hang_up(late)
            guests = [(guest, end) for guest, end in guests if guest not in late]
    finally:
        _hang_up([guest for guest, _ in guests])
    return [found[rank] for rank in range(count)]


def _greet(guest: socket.socket, key: bytes, found: dict[int, Connection]) -> None:
    """Note a process that knows the key under its rank; the reads end when `guest` is shut down."""
    with guest, contextlib.suppress(AuthenticationError, EOFError, OSError):
        connection = Connection(guest.dup().detach())
        deliver_challenge(connection, key)  # theirs is answered by nobody who has not passed ours
        answer_challenge(connection, key)
        rank = json.loads(connection.recv_bytes())["rank"]
        guest.close()  # from here on nobody hangs up
        found[rank] = connection


def _hang_up(guests: Sequence[socket.socket]) -> None:
    for guest in guests:
        with contextlib.suppress(OSError):  # greeted by now, or gone
            guest.shutdown(socket.SHUT_RDWR)
