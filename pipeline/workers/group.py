"""Run persistent worker processes, one or a group of ranks, that take orders and are killed as a whole.

For work that must not or cannot happen in the flow's own process: ranks of a training group, an inference engine with an
environment of its own. A group is started once and kept warm (`pipeline/residency.py`); between orders it holds a cache of
artifacts, never state. What goes over the wire is small JSON; tensors and tables go through files.

Each process has a session of its own, so that Ctrl-C reaches only the flow and a kill reaches whatever the process started.
A process that dies, hangs or fails ends the order, and the group, with an error that has its rank, exit code and last lines.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import Any, Final

from pipeline.orchestration.interruption import check
from pipeline.progress import report
from pipeline.workers import process as worker
from pipeline.workers.process import keep_alive

_LAST_LINES: Final = 12
_TICK: Final = 0.2
"""Seconds between two looks at whether every process still lives."""
_ENDING: Final = 3.0
"""Seconds until a process that hung up has ended, so that its exit code is known."""
_DEATHS: Final = 0.5
"""Seconds in which the death of a rank shows, once another reports that it lost its peers."""

Hear = Callable[[int, str, dict[str, Any]], None]
"""Takes the progress of a rank: its topic and values."""


class WorkerError(RuntimeError):
    """A worker process that died, hung, or could not do what it was asked."""

    def __init__(self, message: str, *, rank: int, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code
        """Negative: the signal that ended it. None: it was alive."""


class RefusedError(WorkerError):
    """A process says itself what is wrong with an order; it was alive then."""

    def __init__(self, called: str, kinds: Sequence[str], text: str, *, rank: int) -> None:
        super().__init__(f"{called}: {kinds[0]}: {text}", rank=rank)
        self.kinds = kinds
        """Names of the exception's class and of those it derives from."""
        self.text = text


class Group:
    """Worker processes that run one handler (see `pipeline/workers/process.py`), started together and ended together."""

    def __init__(
        self,
        name: str,
        handler: Path,
        *,
        python: Path,
        environments: Sequence[Mapping[str, str]],
        logs: Path,
        deadline: float,
        address: str = "127.0.0.1",
        starts: Sequence[str | None] | None = None,
    ) -> None:
        """Start the processes and wait until each has made its handler.

        Args:
            name: what errors call them.
            handler: the module file that has `make_handler`.
            python: the interpreter.
            environments: the whole environment of each process; as many processes as there are of these.
            logs: folder for what they print, `<name>-<rank>.log`, overwritten.
            deadline: seconds until all must be ready.
            address: what the launcher listens on while they connect; one of this host's, and of no other unless they are there.
            starts: of each process, the command that runs `{command}` on its host (`ssh node2 {command}`); None: a child of
                this process. Interpreter and files have the same paths on all hosts.

        Raises:
            WorkerError: one died, failed or was not ready in time; none is left.
        """
        self.name = name
        self.failed = False
        """Whether a process failed, so that somebody may want to read the logs; Ctrl-C is no failure."""
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"{name}-{rank}.log" for rank in range(len(environments))]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._hear: Hear = _report
        self._stopped = ""
        atexit.register(self.close)
        with self._or_nothing(always=True), socket.create_server((address, 0)) as server:
            key, (host, port) = secrets.token_bytes(32), server.getsockname()
            command = [str(python), "-P", worker.__file__, str(handler)]
            for rank, surroundings in enumerate(environments):
                launcher = {worker.ADDRESS: f"{host}:{port}", worker.KEY: key.hex(), worker.RANK: str(rank)}
                start = None if starts is None else starts[rank]
                self._processes.append(_started(command, {**surroundings, **launcher}, self._logs[rank], start))
            end = time.monotonic() + deadline
            look = functools.partial(self._look, end, deadline=deadline)
            self._connections = accept_ranks(server, key, len(self._processes), look)
            self._replies(end, deadline)

    def order(
        self, order: Mapping[str, Any], *, deadline: float, renewed: bool = False, hear: Hear | None = None
    ) -> list[Any]:
        """Give every process the same order; return the reply of each, by rank. Progress is reported as it comes.

        Args:
            deadline: seconds until every process must have replied.
            renewed: by every report of progress, for work of unknown length; a process that hangs reports nothing.
            hear: takes every rank's progress; None: that of rank 0 is reported under the topic it has.

        Raises:
            WorkerError: a process died, failed (`RefusedError`), or missed the deadline. The group is ended, unless it is a
                single process that says itself what was wrong with the order.
        """
        self._hear = hear or _report
        with self._or_nothing():
            for rank, connection in enumerate(self._connections):
                try:
                    connection.send_bytes(json.dumps(order).encode())
                except OSError:
                    raise self._death(rank) from None
            return self._replies(time.monotonic() + deadline, deadline, renewed=renewed)

    def stop(self, reason: str) -> None:
        """Take no more orders; a thread that waits for replies kills the group and raises KeyboardInterrupt."""
        self._stopped = reason

    @property
    def pids(self) -> list[int]:
        """Return process ids by rank, for as long as the group is there; each leads a process group of its own."""
        return [process.pid for process in self._processes]

    @property
    def alive(self) -> bool:
        """Return whether every process is there and can take orders."""
        return (
            bool(self._processes) and not self._stopped and all(process.poll() is None for process in self._processes)
        )

    def close(self) -> None:
        """End all processes and whatever they started; at once for those that do not end by themselves."""
        atexit.unregister(self.close)
        for connection in self._connections:
            connection.close()
        end = time.monotonic() + (worker.GRACE if self._connections else 0.0)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        self._kill()

    @contextlib.contextmanager
    def _or_nothing(self, *, always: bool = False) -> Iterator[None]:
        """Kill the group when the block is left by an exception, Ctrl-C included: what computes hears nothing else."""
        try:
            yield
        except BaseException as error:
            if always or len(self._processes) > 1 or not isinstance(error, RefusedError):
                self._kill()
                self.failed = isinstance(error, WorkerError)
            raise

    def _kill(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # also where it ended: what it started is in its group
            process.wait()
        self._processes, self._connections = [], []

    def _replies(self, end: float, deadline: float, *, renewed: bool = False) -> list[Any]:
        replies: dict[int, Any] = {}
        while len(replies) < len(self._connections):
            missing = [rank for rank in range(len(self._connections)) if rank not in replies]
            self._look(end, missing, deadline=deadline)
            for connection in wait([self._connections[rank] for rank in missing], timeout=_TICK):
                assert isinstance(connection, Connection)
                self._take(self._connections.index(connection), replies)
                end = time.monotonic() + deadline if renewed else end
        return [replies[rank] for rank in sorted(replies)]

    def _take(self, rank: int, replies: dict[int, Any]) -> None:
        try:
            message = json.loads(self._connections[rank].recv_bytes())
        except (EOFError, OSError):
            raise self._death(rank) from None
        if "error" in message:
            raise self._refusal(rank, message)
        if "report" in message:
            topic, values = message["report"]
            self._hear(rank, topic, values)
        else:
            replies[rank] = message["reply"]

    def _refusal(self, rank: int, message: Mapping[str, Any]) -> WorkerError:
        """Return what a process reports as wrong; or the death of another, where that is the cause."""
        end = time.monotonic() + _DEATHS
        while len(self._processes) > 1 and time.monotonic() < end:
            for other, process in enumerate(self._processes):
                if process.poll() is not None:
                    return self._death(other)
            time.sleep(0.01)
        return RefusedError(self._called(rank), message["kinds"], message["error"], rank=rank)

    def _look(self, end: float, missing: Sequence[int], *, deadline: float) -> None:
        """Raise for a process that is dead, or for those that are late."""
        check()
        if self._stopped:
            raise KeyboardInterrupt(self._stopped)
        for rank, process in enumerate(self._processes):
            # In this order: what a process said before it ended is there once it has ended.
            if process.poll() is not None and not (rank < len(self._connections) and self._connections[rank].poll()):
                raise self._death(rank)
        if time.monotonic() > end:
            late = " and ".join(map(str, missing))
            raise WorkerError(
                f"{self.name}: rank {late} of {len(self._processes)} gave no answer within {deadline:.0f} s and was killed; "
                f"raise the deadline if the work needs longer. Last lines:\n{self._tail(missing[0])}",
                rank=missing[0],
            )

    def _death(self, rank: int) -> WorkerError:
        """Return why a process died."""
        end = time.monotonic() + _ENDING
        while self._processes[rank].poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        code = self._processes[rank].poll()
        reason = {None: "hung up", -9: "was killed (signal 9: out of memory, or by hand)"}.get(
            code, f"ended with exit code {code}"
        )
        return WorkerError(
            f"{self._called(rank)} {reason}. Its last lines ({self._logs[rank]}):\n{self._tail(rank)}",
            rank=rank,
            exit_code=code,
        )

    def _called(self, rank: int) -> str:
        return f"{self.name}, rank {rank} of {len(self._processes)}" if len(self._processes) > 1 else self.name

    def _tail(self, rank: int) -> str:
        lines = self._logs[rank].read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join(f"  | {line}" for line in lines) or "  | (it printed nothing)"


def _report(rank: int, topic: str, values: dict[str, Any]) -> None:
    if rank == 0:
        report(topic, **values)


def _started(
    command: Sequence[str], environment: Mapping[str, str], log: Path, start: str | None
) -> subprocess.Popen[bytes]:
    """Start the process, or the command that runs it on another host and ends with it."""
    if start is not None:
        there = shlex.join([*command, worker.ELSEWHERE])
        command = [part.replace("{command}", there) for part in shlex.split(start)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment) if start is None else None,
            stdin=subprocess.DEVNULL if start is None else subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin as given:  # it is dead: `_look` says so
            given.write(json.dumps(dict(environment)).encode() + b"\n")
    return process


def importing_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which a child of this interpreter imports our packages, installed or not."""
    ours = str(Path(__file__).parents[2])
    return {**environment, "PYTHONPATH": os.pathsep.join([ours, *filter(None, [environment.get("PYTHONPATH")])])}


_PATIENCE: Final = 30.0
"""Seconds in which a connection must be authenticated; the processes that we started take milliseconds."""
_ACCEPTING: Final = 0.02
"""Seconds for which a new connection is waited for, between two looks at the others."""


def accept_ranks(
    server: socket.socket, key: bytes, count: int, look: Callable[[Sequence[int]], None]
) -> list[Connection]:
    """Return one connection for each of `count` processes, by the ranks 0 .. count - 1 that they send.

    Each proves that it knows the group's key before anything else is read from it, in a thread of its own: a silent or slow
    one delays no other.

    Args:
        key: the secret that both sides prove to know, by HMAC, without showing it.
        look: called again and again with the missing ranks; what it raises ends the handshake.
    """
    found: dict[int, Connection] = {}
    pending: list[tuple[socket.socket, float]] = []
    server.settimeout(_ACCEPTING)
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
