"""Locks between processes that a dead holder cannot keep: `flock` on a file that exists only while it is held.

Not lock-by-existence: the kernel frees a lock when its holder dies, however it dies. Works between threads, processes and,
where the file system supports `flock`, hosts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.progress import report

__all__ = ["locked", "try_lock"]

_held: set[int] = set()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock named by `path`, waiting for it as long as it takes; a wait is reported."""
    handle = _acquire(path, wait=False)
    if handle is None:
        report("lock", waiting_for=path.name)
        handle = _acquire(path, wait=True)
    try:
        yield
    finally:
        _release(path, handle)


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold the lock if nobody else does; yields whether it is held."""
    handle = _acquire(path, wait=False)
    try:
        yield handle is not None
    finally:
        _release(path, handle)


def _acquire(path: Path, *, wait: bool) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _held.add(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before removed its file on leaving: then this one is a lock on nothing, and the next file counts.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(handle)):
                    return handle
        except BlockingIOError:
            _close(handle)
            return None
        except BaseException:
            _close(handle)
            raise
        _close(handle)


def _release(path: Path, handle: int | None) -> None:
    if handle not in _held:  # not acquired, or inherited by a fork
        return
    with contextlib.suppress(OSError):  # a file that stays behind locks nothing
        os.unlink(path)
    fcntl.flock(handle, fcntl.LOCK_UN)
    _close(handle)


def _close(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)


def _drop_inherited() -> None:
    """A forked worker must not keep alive the lock of a parent that was killed."""
    for handle in list(_held):
        _close(handle)


os.register_at_fork(after_in_child=_drop_inherited)
