"""Locks between processes that a dead holder cannot keep: `flock`, which the kernel frees when its holder dies.

They work between threads, processes and, where the file system supports `flock`, hosts. No other module calls `flock`.

* `locked`, `try_lock`: a lock whose file exists only while it is held;
* `lock_file`: a lock on a file that is kept, for as long as it is open;
* `is_locked`: whether a live process holds either.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from pipeline.config import ConfigError
from pipeline.progress import report

_PLAIN: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Follow no link and wait for no pipe: where others may write, they may have put either."""
_NOTE_BYTES: Final = 4096
_POLL: Final = 0.02

_held: set[int] = set()


def private_folder(path: Path) -> Path:
    """Return a folder that only this user may write into, made where there is none.

    For places below the system's temporary folder, where any user may have put something of that name.

    Raises:
        ConfigError: it is a link, or somebody else's, or others may write into it.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    state = path.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise ConfigError(
            f"{path}: expected a folder of this user (uid {os.getuid()}) that no one else may write into, found "
            f"{stat.filemode(state.st_mode)} of uid {state.st_uid}; remove it, or set TMPDIR to a folder of yours"
        )
    return path


def write_note(path: Path, text: str) -> None:
    """Write a note into the file of a held lock; raise OSError for a link, or for no plain file of this user."""
    handle = os.open(path, os.O_WRONLY | _PLAIN)
    try:
        state = _require_plain(handle, path)
        if state.st_nlink != 1 or state.st_uid != os.getuid():
            raise OSError(errno.EPERM, "a lock is a file of this user under one name; remove it", str(path))
        os.ftruncate(handle, 0)
        os.write(handle, text.encode()[:_NOTE_BYTES])
    finally:
        os.close(handle)


def read_note(path: Path) -> str:
    """Return what `write_note` left in the file of a lock; raise OSError or ValueError where that is no text."""
    handle = os.open(path, os.O_RDONLY | _PLAIN)
    try:
        _require_plain(handle, path)
        return os.read(handle, _NOTE_BYTES).decode()
    finally:
        os.close(handle)


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
    """Hold the lock if no other process does; yields whether it is held."""
    handle = _acquire(path, wait=False)
    try:
        yield handle is not None
    finally:
        _release(path, handle)


def lock_file(file: IO[Any], *, seconds: float = math.inf) -> bool:
    """Lock an open file until it is closed everywhere; return whether it was free within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if seconds < math.inf else 0))
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)


def is_locked(path: Path) -> bool | None:
    """Return whether a live process holds the lock of a file; None where there is no such file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # Shared, so that two processes that look do not take one another for the holder.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _acquire(path: Path, *, wait: bool) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _PLAIN, 0o666)
        _held.add(handle)
        try:
            _require_plain(handle, path)
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


def _require_plain(handle: int, path: Path) -> os.stat_result:
    state = os.fstat(handle)
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "a lock is a plain file; remove what lies there", str(path))
    return state


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
    """Close inherited locks: a forked worker must not keep alive the lock of a parent that was killed."""
    for handle in list(_held):
        _close(handle)


os.register_at_fork(after_in_child=_drop_inherited)
