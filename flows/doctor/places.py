"""Checks of the root folder: file system, space, the commits of the store, locks between processes, what lies there."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import psutil

from flows.doctor.children import importing_ours
from flows.doctor.finding import Finding
from flows.doctor.subject import Subject
from flows.wording import size
from pipeline.config import ConfigError
from pipeline.provenance import Call
from pipeline.remote.store import Upstream
from pipeline.store import Store
from pipeline.store.actions import read_call
from pipeline.store.files import StoreError
from pipeline.store.locks import try_lock

__all__ = ["commits", "exclusion", "file_system", "locking", "records", "shared", "space", "temporary"]

_NETWORK: Final = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "gluster", "lustre", "gpfs", "beegfs", "fuse.")
"""How the kinds of file systems begin that reach several hosts, or that a program in user space serves."""
_VOLATILE: Final = ("tmpfs", "ramfs")
_NO_SPACE: Final = 2e8
_LITTLE_SPACE: Final = 5e9
"""Bytes. Ours: a run of `arithmetic_cpu` writes some hundred megabytes; one checkpoint of a model of 0.5 B parameters, with
its optimizer's state, 6 GB."""
_FEW_FILES: Final = 1000
_HOLDER: Final = (sys.executable, "-P", str(Path(__file__).with_name("lock_holder.py")))
_SECONDS: Final = 20.0
_FREED: Final = 0.5
"""Seconds in which the lock of a killed process must be free."""
_NEWEST: Final = 10
_PATIENCE: Final = 10.0
"""Seconds for which a request to a remote store is repeated here; a run has more."""
_ELSEWHERE: Final = "choose another folder: --root, or COHORT_ROOT"


def file_system(subject: Subject) -> Iterator[Finding]:
    """What the root lies on."""
    root = subject.places.root
    kind = kind_of(nearest(root))
    found, values = f"{root} ({kind}{'' if root.exists() else '; is not there yet'})", {"root": str(root), "kind": kind}
    if kind.startswith(_VOLATILE):
        advice = f"what lies in memory is gone at the next start; {_ELSEWHERE}"
        yield Finding("root", "warning", found, advice, values)
    elif kind.startswith(_NETWORK):
        advice = (
            "one host at a time, unless its locks reach all hosts; databases are safer on a local disk: name servers by "
            f"PREFECT_API_URL and MLFLOW_TRACKING_URI, or {_ELSEWHERE}"
        )
        yield Finding("root", "warning", found, advice, values)
    else:
        yield Finding("root", "ok", found, values=values)


def space(subject: Subject) -> Iterator[Finding]:
    """Bytes and files that the root's file system has left."""
    place = nearest(subject.places.root)
    free, files = shutil.disk_usage(place).free, os.statvfs(place)
    values = {"free": free, "free_files": files.f_favail if files.f_files else None}
    found = f"{size(free)} free" + (f", {files.f_favail:,} files" if files.f_files else "")
    if free < _NO_SPACE or (files.f_files and files.f_favail < _FEW_FILES):
        yield Finding("space", "problem", found, f"`cohort prune` frees old checkpoints; or {_ELSEWHERE}", values)
    elif free < _LITTLE_SPACE:
        yield Finding("space", "warning", found, "enough for the built-in recipes, not for large checkpoints", values)
    else:
        yield Finding("space", "ok", found, values=values)


def commits(subject: Subject) -> Iterator[Finding]:
    """The store's own commit on this file system: files synced, a folder renamed, a second of equal content, a record."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_scratch(subject))
            began = time.perf_counter()
            _commit(Store(folder / "store"))
            seconds = time.perf_counter() - began
            _part(subject)
        except (OSError, RuntimeError) as error:
            yield Finding(
                "store.write", "problem", f"cannot be written: {error}", f"mend permissions or space; {_ELSEWHERE}"
            )
            return
    found = f"two artifacts and a record committed in {1000 * seconds:.0f} ms"
    yield Finding("store.write", "ok", found, values={"seconds": round(seconds, 4)})
    if subject.places.upstream is not None and not subject.quick:
        yield shared(subject.places.upstream)


def shared(url: str) -> Finding:
    """The store that several machines share: whether it can be written, listed and deleted from, and the clocks."""
    try:
        began = time.perf_counter()
        upstream = Upstream(url, patience=_PATIENCE)
        skew, identity = upstream.probe(), upstream.identity(create=False)
        seconds = time.perf_counter() - began
    except (StoreError, ConfigError) as error:
        return Finding("store.remote", "problem", str(error), "mend it, or COHORT_STORE, before a run")
    known = f"store {identity[:12]}" if identity else "no store yet"
    found = f"{upstream.url}: {known}; written, listed and deleted in {seconds:.1f} s, clocks {abs(skew):.0f} s apart"
    return Finding("store.remote", "ok", found, values={"url": upstream.url, "seconds": seconds, "skew": skew})


def _commit(store: Store) -> None:
    def fill(draft: Path) -> None:
        (draft / "part").mkdir()
        (draft / "part" / "file").write_bytes(bytes(4096))

    digests = {store.publish(fill, about={}) for _ in range(2)}
    digest = digests.pop()
    made = Call("doctor", "1", {}).provenance()
    store.record("0" * 64, {**made, "result": digest, "type": "Folder", "seconds": 0.0})
    found = Store(store.root).find("0" * 64)
    if digests or found is None or found["result"] != digest or len(list(store.digests())) != 1:
        raise RuntimeError("what was written is not what is read back")


def _part(subject: Subject) -> None:
    """Folders below the root may be links to elsewhere, or belong to somebody else."""
    for place in (subject.places.root, subject.places.store, subject.places.runs, subject.places.prefect):
        if place.is_symlink() and not place.exists():
            raise FileNotFoundError(f"{place} is a link to what is not there")
        if place.exists():
            with tempfile.TemporaryFile(dir=place):
                pass


def locking(subject: Subject, holder: Sequence[str] = _HOLDER) -> Iterator[Finding]:
    """Locks between two processes: one holds, the other must not; the holder is killed, and the lock must be free.

    Args:
        holder: a program that holds the lock of its last argument, says "held", and waits.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_scratch(subject))
            fault = exclusion(folder / "lock", holder, subject)
        except OSError as error:
            fault = str(error)
    if fault:
        advice = (
            f"this file system or its mount does not lock (NFS: mount without nolock); {_ELSEWHERE} on a local disk"
        )
        yield Finding("locking", "problem", fault, advice)
    else:
        yield Finding("locking", "ok", "a second process waits, and a killed holder's lock is free")


def exclusion(lock: Path, holder: Sequence[str], subject: Subject) -> str:
    """What is wrong with locks beside `lock`; empty: nothing."""
    child = subprocess.Popen(
        [*holder, str(lock)],
        env=importing_ours(subject.environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    try:
        ready, _, _ = select.select([child.stdout], [], [], _SECONDS)
        if not ready or child.stdout.readline().strip() != b"held":
            return f"another process could not take a lock in {lock.parent}"
        with try_lock(lock) as taken:
            if taken:
                return (
                    "two processes held one lock at the same time: runs started together would spoil each other's work"
                )
    finally:
        child.kill()
        child.communicate()
    return "" if _becomes_free(lock) else "the lock of a killed process stays held"


def _becomes_free(lock: Path) -> bool:
    end = time.monotonic() + _FREED
    while time.monotonic() < end:
        with try_lock(lock) as taken:
            if taken:
                return True
        time.sleep(0.05)
    return False


def records(subject: Subject) -> Iterator[Finding]:
    """What the store holds, and whether its newest records can be read; `cohort verify` reads everything."""
    store = subject.places.store
    files = list(store.glob("actions/*/*.json"))
    if not files:
        yield Finding("store.read", "ok", "no records yet", values={"records": 0})
        return
    newest = sorted(files, key=_changed)[-_NEWEST:]
    faults = []
    for path in newest:
        try:
            read_call(path)
        except (StoreError, OSError) as error:
            faults.append(str(error).split(";")[0])
    values = {"records": len(files), "read": len(newest), "damaged": len(faults)}
    if faults:
        advice = f"cohort verify --repair{subject.places.option()}"
        yield Finding("store.read", "warning", f"{len(faults)} of {len(newest)} records: {faults[0]}", advice, values)
    else:
        yield Finding("store.read", "ok", f"{len(files):,} records; the newest {len(newest)} are sound", values=values)


def _changed(path: Path) -> float:
    """When a file was written; a run may remove it meanwhile."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def temporary(subject: Subject) -> Iterator[Finding]:
    """The folder for scratch files, where ranks and vLLM's worker meet."""
    place = Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    found, values = f"{place}, {size(free)} free", {"folder": str(place), "free": free}
    if free < _NO_SPACE:
        yield Finding("temporary", "problem", found, "free space there, or set TMPDIR", values)
    else:
        yield Finding("temporary", "ok", found, values=values)


@contextlib.contextmanager
def _scratch(subject: Subject) -> Iterator[Path]:
    """A folder where the store is or will be, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=".cohort-doctor-", dir=nearest(subject.places.store)) as folder:
        yield Path(folder)


def nearest(path: Path) -> Path:
    """The path itself, or the nearest above it that is there."""
    return path if path.exists() or path == path.parent else nearest(path.parent)


def kind_of(path: Path) -> str:
    """The kind of file system that a path lies on, such as `ext4`."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return str(max(mounts, key=lambda part: len(part.mountpoint)).fstype) if mounts else "unknown"
