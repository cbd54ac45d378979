"""The launcher's side of the handshake: each process proves that it knows the group's key before anything else is read from it.

Each connection is authenticated in a thread of its own: a silent or slow one delays no other.
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

_PATIENCE: Final = 30.0
"""Seconds in which a connection must be authenticated; the processes that we started take milliseconds."""
_TICK: Final = 0.02
"""Seconds between two looks at the connections."""


def accept_ranks(
    server: socket.socket, key: bytes, count: int, look: Callable[[Sequence[int]], None]
) -> list[Connection]:
    """Return one connection for each of `count` processes, by the ranks 0 .. count - 1 that they send.

    Args:
        key: the secret that both sides prove to know, by HMAC, without showing it.
        look: called again and again with the missing ranks; what it raises ends the handshake.
    """
    found: dict[int, Connection] = {}
    pending: list[tuple[socket.socket, float]] = []
    server.settimeout(_TICK)
    try:
        while missing := [rank for rank in range(count) if rank not in found]:
            look(missing)
            with contextlib.suppress(TimeoutError, ConnectionAbortedError):
                peer, _ = server.accept()
                keep_alive(peer)
                pending.append((peer, time.monotonic() + _PATIENCE))
                arguments = (peer, key, found)
                threading.Thread(target=_authenticate, args=arguments, name="handshake", daemon=True).start()
            late = [peer for peer, end in pending if time.monotonic() > end]
            _shut_down(late)
            pending = [(peer, end) for peer, end in pending if peer not in late]
    finally:
        _shut_down([peer for peer, _ in pending])
    return [found[rank] for rank in range(count)]


def _authenticate(peer: socket.socket, key: bytes, found: dict[int, Connection]) -> None:
    """Note a process that knows the key under its rank; the reads end when `peer` is shut down."""
    with peer, contextlib.suppress(AuthenticationError, EOFError, OSError):
        connection = Connection(peer.dup().detach())
        deliver_challenge(connection, key)  # first ours: an unknown peer gets no answer to its own
        answer_challenge(connection, key)
        rank = json.loads(connection.recv_bytes())["rank"]
        peer.close()  # from here on it is not shut down
        found[rank] = connection


def _shut_down(peers: Sequence[socket.socket]) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):  # authenticated by now, or gone
            peer.shutdown(socket.SHUT_RDWR)
